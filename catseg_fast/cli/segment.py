"""`catseg-fast segment`: pictures, folders and globs to label maps. Torch is imported when it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from catseg_fast._version import __version__
from catseg_fast.backend import choose_backend, default_device
from catseg_fast.cli.labelling import (
    AllClasses,
    Best,
    Explain,
    Labelling,
    Memory,
    MinScore,
    Present,
    TopK,
    check_limit,
    check_memory,
    limit_classes,
)
from catseg_fast.cli.long import FPS, Every, Overlap, TileSize, Video, check_tiling, divide, filming, tiling
from catseg_fast.cli.options import (
    BUNDLED_WEIGHTS,
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
    no_nan,
    note_on_bundled,
    weights_or_bundled,
)
from catseg_fast.cli.results import print_results
from catseg_fast.config import MAX_PIXELS
from catseg_fast.console import (
    Debug,
    choice,
    describe,
    image_progress,
    output_folder,
    plain_errors,
    say_error,
    say_note,
    stderr,
    stdout,
)
from catseg_fast.distributed.torchrun import Processes, join, own_device
from catseg_fast.output.formats import FORMATS, check_formats
from catseg_fast.output.statistics import check_target, write_statistics
from catseg_fast.text.fold import split_fold
from catseg_fast.text.prompts import check_classes

if TYPE_CHECKING:
    from catseg_fast.cli.batch import Batch, Outcome
    from catseg_fast.cli.inputs import Picture
    from catseg_fast.cli.long import Run

EXAMPLES = (
    'catseg-fast segment photo.jpg --classes "sky; tree; person, man" --weights model_base.pth',
    "catseg-fast segment photos/*.jpg --classes-file classes.txt --weights v2-vitl --output results",
    "catseg-fast segment photos --classes-list ade-150 --weights v2-vitl --stats classes.parquet",
    "catseg-fast segment photo.jpg --classes-list imagenet-12k --all-classes --memory 2GiB --present 0.01",
    'catseg-fast segment photo.jpg --classes "cat; dog" --weights v2-vitl --min-score 0.3',
    "catseg-fast segment photo.jpg --device cuda --dtype float16 --whole",
    "catseg-fast segment clip.mp4 --classes-file classes.txt --weights v2-vitb --every 5",
    "catseg-fast segment aerial.tif --classes-file classes.txt --weights v2-vitl --tiles 1280 --whole",
    "torchrun --nproc-per-node 8 -m catseg_fast segment photo.jpg --classes-file c.txt --class-parallel",
)


def segment(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE",
            help="Pictures, folders of pictures, globs in quotes ('photos/**/*.jpg'), or videos (clip.mp4).",
        ),
    ],
    classes: Classes = None,
    classes_file: ClassesFile = None,
    classes_list: ClassesList = None,
    weights: Weights = None,
    variant: VariantName = None,
    output: Annotated[Path, output_folder("Folder of the results.")] = Path("segmented"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also segment pictures whose results are up to date.")
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
        list[str] | None, choice("--format", tuple(FORMATS), "Also write, repeatable")
    ] = None,
    min_score: MinScore = None,
    present: Present = None,
    top_k: TopK = None,
    all_classes: AllClasses = False,
    best: Best = None,
    memory: Memory = None,
    say_how: Explain = False,
    tiles: TileSize = None,
    overlap: Overlap = None,
    video: Video = False,
    every: Every = 1,
    fps: FPS = 25,
    alpha: Annotated[
        float, typer.Option(min=0, max=1, callback=no_nan, help="Share of the colours in the overlay.")
    ] = 0.55,
    text_cache: TextCache = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    seed: Seed = 0,
    class_parallel: Annotated[
        bool,
        typer.Option(
            "--class-parallel",
            help="Split the classes over the processes (GPUs) that torchrun has started; only rank 0 reads "
            "pictures and writes.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Label every pixel of pictures with one of the classes.

    Writes for each picture NAME.overlay.png (colours and legend), NAME.labels.png (each pixel's class index,
    16 bits; 65535 is none of these) and NAME.json (each class's index, share of the pixels and mean score).
    For each video, NAME.overlay.mp4 and a label map per frame in NAME.labels/. With --tiles, the label map is
    NAME.labels.tif, with the georeference of the picture, and the overlay is reduced. Results of the same
    picture content, weights, classes and options are kept: an interrupted run continues. Other files
    are never replaced: the results' names are then numbered.
    """
    check_limit(all_classes, best)
    weights = weights_or_bundled(weights, variant)
    names = class_names(classes, classes_file, classes_list, weights)
    try:
        if stats is not None:
            check_target(stats)
    except (ValueError, ImportError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--stats") from None
    formats = formats or []
    unfit = {"--format": formats, "--batch": batch > 1, "--class-parallel": class_parallel, "--top-k": top_k}
    check_tiling(tiles, overlap, unfit)
    try:
        check_formats(formats, len(names))
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error).removeprefix("formats: "), param_hint="--format") from None
    with plain_errors(debug), _processes(class_parallel, device) as (processes, device):
        # Checks without torch come first, as its import takes seconds.
        from catseg_fast.checkpoints.hub import resolve
        from catseg_fast.cli.inputs import find_pictures, require_one

        check_classes(split_fold(names)[0])
        found: list[Picture] = []
        if processes.first:
            found = find_pictures(images, output, _notice, whole_folders=video)
        pictures, clips = divide(found, tiles, video, every, top_k)
        require_one(found)
        if weights == BUNDLED_WEIGHTS:
            note_on_bundled(picture.path for picture in found)
        file = None if weights is None else resolve(weights)
        check_memory(memory)
        choose_backend(backend, device or default_device())  # fail before the model is loaded
        with stderr.status("Loading the model …"):
            model = build_model(
                file, variant, names, seed, device=device, dtype=dtype,
                sliding_window=sliding_window, backend=backend, text_cache=text_cache,
                memory_budget=memory, max_pixels=max_pixels,
            )  # fmt: skip
            from catseg_fast.cli.resume import fingerprint

            note = limit_classes(model, all_classes, best)
            labelling = Labelling(model, top_k, min_score, present)
            about = {
                "variant": model.variant.name,
                "weights": weights,
                "catseg_fast": __version__,
                "fingerprint": fingerprint(model, file, seed, alpha, labelling.settings),
            }
        if note is not None and processes.first:
            say_note(note)
        conductor = None
        if class_parallel:
            from catseg_fast.distributed.conductor import Conductor

            model.split_classes()
            conductor = Conductor(model)
            labelling = replace(labelling, model=conductor)
            if not processes.first:
                conductor.follow()
                return
        from catseg_fast.cli.batch import Batch

        if say_how:
            stdout.print(model.explain())
        start = time.perf_counter()
        if tiles is None:
            work = Batch(
                labelling, about, alpha=alpha, formats=formats, size=batch, overwrite=overwrite,
                present=present, max_pixels=max_pixels,
            )  # fmt: skip
            outcomes = _segment_all(work, pictures, debug)
        else:
            run = tiling(model, labelling, about, tiles, overlap, alpha, overwrite)
            outcomes = _segment_long(run, pictures, 0, debug)
        if clips:
            run = filming(model, labelling, about, every, fps, alpha, overwrite)
            outcomes += _segment_long(run, clips, len(pictures), debug)
        seconds = time.perf_counter() - start
        if conductor is not None:
            conductor.end()
        if stats is not None:
            write_statistics(stats, [outcome.picture.result("json") for outcome in outcomes])
    print_results(outcomes, len(found), seconds)
    if len(outcomes) < len(found):
        stderr.print(f"{len(found) - len(outcomes)} of {len(found)} images failed")
        raise typer.Exit(1)


def _notice(text: str) -> None:
    stderr.print(text)


@contextmanager
def _processes(class_parallel: bool, device: str | None) -> Iterator[tuple[Processes, str | None]]:
    """Yield the processes that share the classes, and this one's device, or None for the default."""
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
            if _succeeded(outcome, debug):
                outcomes.append(outcome)
    return sorted(outcomes, key=lambda outcome: outcome.index)


def _segment_long(run: Run, pictures: Sequence[Picture], first: int, debug: bool) -> list[Outcome]:
    """Run videos or large pictures, each with its own bar; report those that fail."""
    outcomes = []
    for index, picture in enumerate(pictures, first):
        with image_progress(f"Segmenting {picture.path.name}") as advance:
            outcome = run(index, picture, advance)
        if _succeeded(outcome, debug):
            outcomes.append(outcome)
    return outcomes


def _succeeded(outcome: Outcome, debug: bool) -> bool:
    """Report the error of a picture that failed; raise it for debugging."""
    error, path = outcome.error, str(outcome.picture.path)
    if error is None:
        return True
    if debug:
        raise error
    message = describe(error)
    say_error(message if path in message else f"{path}: {message}")
    return False
