"""The command line, `catseg-fast`. Torch and the model are imported by the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from catseg_fast._version import __version__
from catseg_fast.app_command import EXAMPLES as APP_EXAMPLES
from catseg_fast.app_command import app as open_app
from catseg_fast.config import VARIANTS
from catseg_fast.console import Debug, examples, plain_errors, stderr, stdout
from catseg_fast.segment_command import EXAMPLES as SEGMENT_EXAMPLES
from catseg_fast.segment_command import segment
from catseg_fast.tune_command import EXAMPLES as TUNE_EXAMPLES
from catseg_fast.tune_command import tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"catseg-fast {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        'catseg-fast segment photo.jpg --classes "sky; tree; person, man"',
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


app.command(epilog=examples(*SEGMENT_EXAMPLES))(segment)


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
        from catseg_fast import checkpoint

        with stderr.status("Converting …"):
            written = checkpoint.convert(source, target)
            recognised = checkpoint.recognise_variant(checkpoint.read_checkpoint(written))
        typer.echo(f"{source} is {recognised.name}; wrote {written} ({written.stat().st_size / 1e6:.0f} MB)")


@app.command(epilog=examples("catseg-fast variants"))
def variants() -> None:
    """List the published variants."""
    from catseg_fast.hub import PUBLISHED

    table = Table("variant", "CLIP image tower", "input", "guidance", "prompts", "upstream's weights")
    repositories = dict.fromkeys(repository for _, repository, _ in PUBLISHED.values())
    table.caption = f"The weights are on the Hugging Face Hub in {' and '.join(repositories)}."
    for name, variant in VARIANTS.items():
        clip = variant.clip
        table.add_row(
            name,
            f"{clip.vision_layers} layers of {clip.vision_width}, patch {clip.patch_size}",
            f"{clip.input_size} px",
            variant.backbone if isinstance(variant.backbone, str) else "CLIP",
            variant.prompt_ensemble,
            PUBLISHED[name][2],
        )
    stdout.print(table)


@app.command(epilog=examples("catseg-fast env"))
def env() -> None:
    """Print what a bug report needs: versions, devices, the back end."""
    from catseg_fast.environment import describe_environment

    report = describe_environment()
    width = max(map(len, report))
    for name, value in report.items():
        typer.echo(f"{name:<{width}}  {value}")


app.command("app", epilog=examples(*APP_EXAMPLES))(open_app)
app.command(epilog=examples(*TUNE_EXAMPLES))(tune)
