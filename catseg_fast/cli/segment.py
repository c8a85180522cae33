"""`catseg-fast segment`: pictures, folders and globs to label maps. Torch is imported when it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from catseg_fast._version import __version__
from catseg_fast.backend import choose_backend, default_device
from catseg_fast.cli.options import (
    Backend,
    Classes,
    ClassesFile,
    ClassesList,
    Device,
    Dtype,
    MaxPixels,
    Seed,
    SlidingWindow,
    TextCache,
    VariantName,
    Weights,
    build_model,
    class_names,
    weights_or_bundled,
)
from catseg_fast.config import MAX_PIXELS
from catseg_fast.console import (
    Debug,
    choice,
    describe,
    image_progress,
    output_folder,
    plain_errors,
    say_error,
    stderr,
    stdout,
)
from catseg_fast.distributed.torchrun import Processes, join, own_device
from catseg_fast.output.formats import FORMATS, check_formats
from catseg_fast.output.statistics import check_target, write_statistics

if TYPE_CHECKING:
    from catseg_fast.cli.batch import Batch, Outcome
    from catseg_fast.cli.inputs import Picture

EXAMPLES = (
    'catseg-fast segment photo.jpg --classes "sky; tree; person, man" --weights model_base.pth',
    "catseg-fast segment photos/*.jpg --classes-file classes.txt --weights v2-vitl --output results",
    "catseg-fast segment photos --classes-list ade-150 --weights v2-vitl --stats classes.parquet",
    "catseg-fast segment photo.jpg --device cuda --dtype float16 --whole",
    "torchrun --nproc-per-node 8 -m catseg_fast segment photo.jpg --classes-file c.txt --class-parallel",
)
LISTED = 20  # a line for each picture up to so many; beyond, a line for each of the largest classes


def segment(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...", help="Pictures, folders of pictures, or globs in quotes ('photos/**/*.jpg')."
        ),
    ],
    classes: Classes = None,
    classes_file: ClassesFile = None,
    classes_list: ClassesList = None,
    weights: Weights = None,
    variant: VariantName = None,
    output: Annotated[Path, output_folder("Where the results go.")] = Path("segmented"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also do pictures whose results are up to date.")
    ] = False,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", dir_okay=False,
            help="Also write a table of all pictures' classes: pixels, share and mean score, to a .parquet "
            "or .json file.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Pictures in one call of the model, if few classes leave a GPU idle."
        ),
    ] = 1,
    sliding_window: SlidingWindow = True,
    backend: Backend = "auto",
    formats: Annotated[
        list[str] | None, choice("--format", tuple(FORMATS), "Also write, several times if need be")
    ] = None,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Share of the colours in the overlay.")] = 0.55,
    text_cache: TextCache = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    seed: Seed = 0,
    class_parallel: Annotated[
        bool,
        typer.Option(
            "--class-parallel",
            help="Split the classes over the processes (GPUs) that torchrun has started; rank 0 alone reads "
            "pictures and writes.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Label every pixel of pictures with one of the classes.

    Writes for each picture NAME.overlay.png (colours and legend), NAME.labels.png (each pixel's class index,
    16 bits) and NAME.json (each class's index, share of the pixels and mean score). Results of the same
    picture content, weights, classes and options are kept: a run that was interrupted goes on. Other files
    are never replaced: the results' names are then numbered.
    """
    weights = weights_or_bundled(weights, variant)
    names = class_names(classes, classes_file, classes_list, weights)
    try:
        if stats is not None:
            check_target(stats)
    except (ValueError, ImportError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--stats") from None
    formats = formats or []
    try:
        check_formats(formats, len(names))
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error).removeprefix("formats: "), param_hint="--format") from None
    with plain_errors(debug), _processes(class_parallel, device) as (processes, device):
        from catseg_fast.checkpoints.hub import resolve
        from catseg_fast.cli.inputs import find_pictures
        from catseg_fast.cli.resume import fingerprint

        pictures = find_pictures(images, output, _notice) if processes.first else []
        choose_backend(backend, device or default_device())  # fail before the model is loaded
        with stderr.status("Loading the model …"):
            model = build_model(
                weights, variant, names, seed, device=device, dtype=dtype,
                sliding_window=sliding_window, backend=backend, text_cache=text_cache,
            )  # fmt: skip
            file = None if weights is None else resolve(weights)
            about = {
                "variant": model.variant.name,
                "weights": weights,
                "catseg_fast": __version__,
                "fingerprint": fingerprint(model, file, seed, alpha),
            }
        conductor = None
        if class_parallel:
            from catseg_fast.distributed.conductor import Conductor

            model.split_classes()
            conductor = Conductor(model)
            if not processes.first:
                conductor.follow()
                return
        from catseg_fast.cli.batch import Batch

        start = time.perf_counter()
        work = Batch(
            conductor or model, about, alpha=alpha, formats=formats, size=batch, overwrite=overwrite,
            max_pixels=max_pixels,
        )  # fmt: skip
        outcomes = _segment_all(work, pictures, debug)
        seconds = time.perf_counter() - start
        if conductor is not None:
            conductor.end()
        if stats is not None:
            write_statistics(stats, [outcome.picture.result("json") for outcome in outcomes])
    if outcomes:
        stdout.print(_results_table(outcomes) if len(pictures) <= LISTED else _classes_table(outcomes))
    if len(pictures) > 1:
        stdout.print(_summary(outcomes, len(pictures), seconds), highlight=False)
    if len(outcomes) < len(pictures):
        stderr.print(f"{len(pictures) - len(outcomes)} of {len(pictures)} images failed", highlight=False)
        raise typer.Exit(1)


def _notice(text: str) -> None:
    stderr.print(Text(text), soft_wrap=True)


@contextmanager
def _processes(class_parallel: bool, device: str | None) -> Iterator[tuple[Processes, str | None]]:
    """Yield the processes that share the classes, and this one's device; None for the default one."""
    if not class_parallel:
        yield Processes(), device
        return
    device = own_device(device or default_device().type)
    with join(device, needed_by="--class-parallel") as processes:
        yield processes, device


def _segment_all(work: Batch, pictures: Sequence[Picture], debug: bool) -> list[Outcome]:
    """Report the pictures that fail; return the others' outcomes in the pictures' order."""
    outcomes = []
    with image_progress("Segmenting") as advance:
        advance(0, len(pictures))
        for done, outcome in enumerate(work.run(pictures), 1):
            advance(done, len(pictures))
            error, path = outcome.error, str(outcome.picture.path)
            if error is None:
                outcomes.append(outcome)
            elif debug:
                raise error
            else:
                message = describe(error)
                say_error(message if path in message else f"{path}: {message}")
    return sorted(outcomes, key=lambda outcome: outcome.index)


def _top_classes(summary: list[dict[str, Any]], count: int = 3) -> str:
    largest = sorted(summary, key=lambda entry: -entry["share"])
    return ", ".join(f"{entry['name'].partition(',')[0]} {entry['share']:.0%}" for entry in largest[:count])


def _results_table(outcomes: Sequence[Outcome]) -> Table:
    """A line for each picture."""
    table = Table("image", "largest classes", "time", "overlay")
    for column in table.columns:
        column.overflow = "fold"
    for outcome in outcomes:
        seconds = "there already" if outcome.seconds is None else f"{outcome.seconds:.2f} s"
        cells = (
            str(outcome.picture.path), _top_classes(outcome.summary or []), seconds,
            str(outcome.picture.result("overlay.png")),
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    return table


def _classes_table(outcomes: Sequence[Outcome]) -> Table:
    """A line for each of the largest classes; all pictures count the same."""
    shares: dict[str, list[float]] = {}
    for outcome in outcomes:
        for entry in outcome.summary or []:
            shares.setdefault(entry["name"], []).append(entry["share"])
    table = Table("class", "pictures", "mean share", title=f"{len(shares)} classes occur; the largest are")
    for name, found in sorted(shares.items(), key=lambda item: -sum(item[1]))[:LISTED]:
        table.add_row(Text(name.partition(",")[0]), str(len(found)), f"{sum(found) / len(outcomes):.1%}")
    return table


def _summary(outcomes: Sequence[Outcome], total: int, seconds: float) -> str:
    done = sum(outcome.seconds is not None for outcome in outcomes)
    speed = f" ({done / seconds:.2f} img/s)" if done else ""
    kept, failed = len(outcomes) - done, total - len(outcomes)
    parts = [f"{done} segmented in {seconds:.1f} s{speed}"]
    parts += [f"{kept} there already"] * bool(kept) + [f"{failed} failed"] * bool(failed)
    return ", ".join(parts)
