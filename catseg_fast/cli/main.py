"""The command line, `catseg-fast`. Torch and the model are imported by the commands that need them."""

from __future__ import annotations

import inspect
import sys
import warnings
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from catseg_fast._version import __version__
from catseg_fast.cli import app as app_command
from catseg_fast.cli import dataset as dataset_command
from catseg_fast.cli import eval as eval_command
from catseg_fast.cli import export as export_command
from catseg_fast.cli import scenes as scenes_command
from catseg_fast.cli import segment as segment_command
from catseg_fast.cli import train as train_command
from catseg_fast.cli import tune as tune_command
from catseg_fast.cli import warmup as warmup_command
from catseg_fast.config import VARIANTS
from catseg_fast.console import (
    USAGE_ERROR,
    Debug,
    examples,
    plain_errors,
    say_error,
    show_warning,
    stderr,
    stdout,
)


class Commands(TyperGroup):
    """Prints errors of the arguments in plain lines, since a box breaks the paths in a message.

    The paragraphs of a command's help are joined, since they would keep the line breaks of the source.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for command in self.commands.values():
            paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
            command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, and refuse empty arguments: as a path, one would be the current folder."""
        for number, (previous, argument) in enumerate(pairwise(args), 1):
            empty = ""
            if argument == "":
                empty = previous if previous.startswith("-") and previous != "--" else f"argument {number}"
            elif argument.startswith("--") and argument.endswith("="):
                empty = argument.rstrip("=")
            if empty:
                ctx.fail(f"{empty}: the value is empty; is a shell variable unset?")
        return super().resolve_command(ctx, args)

    def main(self, *arguments: Any, **options: Any) -> Any:
        run = partial(super().main, *arguments, **{**options, "standalone_mode": False})
        if not options.get("standalone_mode", True):
            return run()
        code: Any
        try:
            code = run()
        except USAGE_ERROR as error:
            _say_usage_error(error)
            code = getattr(error, "exit_code", 2)
        except typer.Abort:
            say_error("aborted")
            code = 1
        sys.exit(code if isinstance(code, int) else 0)


def _say_usage_error(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
        return
    if context := getattr(error, "ctx", None):
        stderr.print(context.get_usage())
        stderr.print(f"Try '{context.command_path} --help' for help.")
    say_error(error.format_message())


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a replacement of another type
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = show_warning
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"catseg-fast {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        'catseg-fast segment photo.jpg --classes "sky; tree; person, man" --weights v2-vitl',
        "catseg-fast variants",
        "catseg-fast segment --help",
    )
)
def catseg_fast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """CAT-Seg open-vocabulary segmentation: label every pixel with one of the classes you name."""


app.command(epilog=examples(*segment_command.EXAMPLES))(segment_command.segment)


@app.command(
    epilog=examples(
        "catseg-fast convert model_base.pth model_base.safetensors",
        "catseg-fast convert v2-vitl model_large.safetensors",
    )
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="File, folder, hub id or variant's name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A .safetensors, .pth or .pt file.")],
    debug: Debug = False,
) -> None:
    """Rewrite a checkpoint in another format; safetensors load faster and hold no code."""
    with plain_errors(debug):
        from catseg_fast.checkpoints.hub import resolve

        file = resolve(source)  # fail before torch is imported
        from catseg_fast.checkpoints import checkpoint

        with stderr.status("Converting …"):
            written = checkpoint.convert(file, target)
            recognised = checkpoint.recognise_variant(checkpoint.read_checkpoint(written))
        stdout.print(
            f"{source} is {recognised.name}; wrote {written} ({written.stat().st_size / 1e6:.0f} MB)"
        )


@app.command(epilog=examples("catseg-fast variants"))
def variants() -> None:
    """List the variants: those published by upstream, and the bundled one."""
    from catseg_fast.checkpoints.hub import BUNDLED, PUBLISHED

    table = Table("variant", "CLIP image tower", "input", "guidance", "prompts", "weights")
    repositories = dict.fromkeys(repository for _, repository, _ in PUBLISHED.values())
    table.caption = f"Upstream's weights are on the Hugging Face Hub in {' and '.join(repositories)}."
    for name, variant in VARIANTS.items():
        clip = variant.clip
        table.add_row(
            name,
            f"{clip.vision_layers} layers of {clip.vision_width}, patch {clip.patch_size}",
            f"{clip.input_size} px",
            variant.backbone if isinstance(variant.backbone, str) else "CLIP",
            variant.prompt_ensemble,
            "in this package" if name in BUNDLED else PUBLISHED[name][2],
        )
    stdout.print_table(table, names=(0,))


@app.command(epilog=examples("catseg-fast env"))
def env() -> None:
    """Print the details that a bug report needs: versions, devices, the back end."""
    from catseg_fast.environment import describe_environment

    report = describe_environment()
    width = max(map(len, report))
    for name, value in report.items():
        stdout.print(f"{name:<{width}}  {value}")


for name, command, lines in (
    ("app", app_command.app, app_command.EXAMPLES),
    ("train", train_command.train, train_command.EXAMPLES),
    ("eval", eval_command.evaluate, eval_command.EXAMPLES),
    ("dataset", dataset_command.dataset, dataset_command.EXAMPLES),
    ("scenes", scenes_command.scenes, scenes_command.EXAMPLES),
    ("export", export_command.export, export_command.EXAMPLES),
    ("tune", tune_command.tune, tune_command.EXAMPLES),
    ("warmup", warmup_command.warmup, warmup_command.EXAMPLES),
):
    app.command(name, epilog=examples(*lines))(command)
