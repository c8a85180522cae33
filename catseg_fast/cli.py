"""The command line, `catseg-fast`. Torch and the model are imported by the commands that need them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from catseg_fast._version import __version__
from catseg_fast.backend import BACKENDS, choose_backend, default_device
from catseg_fast.class_list import EVERYDAY_CLASSES, parse_classes, read_classes
from catseg_fast.config import VARIANTS
from catseg_fast.console import (
    USER_ERRORS,
    Debug,
    choice,
    examples,
    plain_errors,
    say_error,
    stderr,
    stdout,
)
from catseg_fast.launch import is_first, process_group
from catseg_fast.tune_command import EXAMPLES, tune

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg

DTYPES = ("float32", "float16", "bfloat16")
UNTRAINED_VARIANT = "v2-vitb"

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


@app.command(
    epilog=examples(
        'catseg-fast segment photo.jpg --classes "sky; tree; person, man" --weights model_base.pth',
        "catseg-fast segment photos/*.jpg --classes-file classes.txt --weights v2-vitl --output results",
        "catseg-fast segment photo.jpg --device cuda --dtype float16 --whole",
        "torchrun --nproc-per-node 8 -m catseg_fast segment photo.jpg --classes-file c.txt --class-parallel",
    )
)
def segment(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to segment.")],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar='"A; B; C"',
            help="Class names, separated by semicolons; commas separate synonyms of one class. "
            f"By default {len(EVERYDAY_CLASSES)} everyday ones: {', '.join(EVERYDAY_CLASSES)}.",
        ),
    ] = None,
    classes_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False,
            help="Class names from a .txt file, one a line, or a .json file, a list of strings.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            help="Checkpoint: a .pth or .safetensors file, its folder, a hub id, or a variant's name for "
            "upstream's weights. Without it the weights are random and the labels mean nothing.",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        choice("--variant", tuple(VARIANTS), "What the checkpoint must be, else told from its content"),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")
    ] = Path("segmented"),
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …; by default a GPU if there is one."),
    ] = None,
    dtype: Annotated[str, choice("--dtype", DTYPES, "Type of the weights")] = "float32",
    sliding_window: Annotated[
        bool,
        typer.Option(
            "--sliding-window/--whole",
            help="Overlapping crops and the whole picture, or the whole picture alone: faster, coarser.",
        ),
    ] = True,
    backend: Annotated[str, choice("--backend", BACKENDS, "Implementation of the aggregator")] = "auto",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Share of the colours in the overlay.")] = 0.55,
    seed: Annotated[int, typer.Option(help="Seed of untrained weights.")] = 0,
    class_parallel: Annotated[
        bool,
        typer.Option(
            "--class-parallel", help="Split the classes over the processes (GPUs) that torchrun has started."
        ),
    ] = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Label every pixel of pictures with one of the classes.

    Writes for each picture NAME.overlay.png (colours and legend), NAME.labels.png (each pixel's class index,
    16 bits) and NAME.json (each class's index, share of the pixels and mean score).
    """
    names = _class_names(classes, classes_file)
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is not a folder", param_hint="--output")
    with plain_errors(debug), process_group(class_parallel, device) as device:
        choose_backend(backend, device or default_device())  # fail before the model is loaded
        with stderr.status("Loading the model …"):
            model = _build_model(
                weights, variant, names, seed, device=device, dtype=dtype,
                sliding_window=sliding_window, backend=backend,
            )  # fmt: skip
            if class_parallel:
                model.split_classes()
        about = {"variant": model.variant.name, "weights": weights, "catseg_fast": __version__}
        rows = _segment_all(model, images, output, alpha, about, debug)
        if rows:
            stdout.print(_results_table(rows))
        if len(rows) < len(images):
            stderr.print(f"{len(images) - len(rows)} of {len(images)} images failed", highlight=False)
    if len(rows) < len(images):
        raise typer.Exit(1)


def _class_names(classes: str | None, classes_file: Path | None) -> list[str]:
    """The class names that the options ask for; what is wrong with a name itself the model says."""
    if classes is not None and classes_file is not None:
        raise typer.BadParameter("give --classes or --classes-file, not both", param_hint="--classes")
    try:
        if classes_file is not None:
            return read_classes(classes_file)
        names = parse_classes(classes) if classes is not None else list(EVERYDAY_CLASSES)
    except (OSError, ValueError) as error:
        hint = "--classes" if classes_file is None else "--classes-file"
        raise typer.BadParameter(str(error), param_hint=hint) from None
    if len(names) == 1 and "," in names[0]:
        count = names[0].count(",") + 1
        stderr.print(f"[yellow]note:[/] this is one class with {count} synonyms; semicolons separate classes")
    return names


def _build_model(
    weights: str | None,
    variant: str | None,
    classes: list[str],
    seed: int,
    *,
    device: str | None,
    dtype: str,
    **options: Any,
) -> CATSeg:
    """The model with a checkpoint's weights, or random ones and a warning where there is none."""
    import torch

    from catseg_fast.model import CATSeg

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise RuntimeError(f"--device: {device!r} is not available: {reason}") from error
    target, precision = device or default_device(), getattr(torch, dtype)
    if weights is not None:
        return CATSeg.from_pretrained(
            weights, classes, variant=variant, device=target, dtype=precision, **options
        )
    stderr.print(
        "[bold yellow]warning:[/] no --weights: the model's weights are untrained (random), "
        "and the labels mean nothing",
        highlight=False,
    )
    torch.manual_seed(seed)
    return CATSeg(variant or UNTRAINED_VARIANT, classes, **options).to(target, precision).eval()


def _segment_all(
    model: CATSeg, paths: list[Path], output: Path, alpha: float, about: dict[str, Any], debug: bool
) -> list[tuple[str, str, str, str]]:
    """Segment and save each picture; report those that fail. Returns the others' rows of the table."""
    from catseg_fast.class_parallel import RankError
    from catseg_fast.images import load_image
    from catseg_fast.results import save_segmentation, summarise, unique_stems

    rows = []
    columns = (TextColumn("Segmenting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        for path, stem in progress.track(list(zip(paths, unique_stems(paths), strict=True))):
            try:
                image = load_image(path).round().byte()  # files hold 8 bits
                start = time.perf_counter()
                segmentation = model.segment(image)
                seconds = time.perf_counter() - start
                summary = summarise(segmentation)
                if is_first():
                    content = {"image": str(path), **about}
                    save_segmentation(output, stem, image, segmentation, content, alpha)
            except USER_ERRORS as error:
                if debug or isinstance(error, RankError):
                    raise
                say_error(error if str(path) in str(error) else f"{path}: {error}")
                continue
            overlay = str(output / f"{stem}.overlay.png")
            rows.append((str(path), _top_classes(summary), f"{seconds:.2f} s", overlay))
    return rows


def _top_classes(summary: list[dict[str, Any]], count: int = 3) -> str:
    largest = sorted((entry for entry in summary if entry["share"]), key=lambda entry: -entry["share"])
    return ", ".join(f"{entry['name'].partition(',')[0]} {entry['share']:.0%}" for entry in largest[:count])


def _results_table(rows: list[tuple[str, str, str, str]]) -> Table:
    table = Table("image", "largest classes", "time", "overlay")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*map(Text, row))
    return table


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


app.command(epilog=examples(*EXAMPLES))(tune)
