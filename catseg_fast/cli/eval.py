"""`catseg-fast eval`: scores of one or several back ends on a labelled data set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catseg_fast._version import __version__
from catseg_fast.backend import BACKENDS, choose_backend, default_device
from catseg_fast.cli.labelling import AllClasses, MinScore
from catseg_fast.cli.options import (
    BUNDLED_WEIGHTS,
    DTYPES,
    ClassesList,
    Device,
    MaxPixels,
    Seed,
    TextCache,
    VariantName,
    build_model,
    note_on_bundled,
    note_separators,
    weights_or_bundled,
)
from catseg_fast.config import MAX_PIXELS
from catseg_fast.console import (
    Debug,
    choice,
    image_progress,
    output_folder,
    plain_errors,
    stderr,
    stdout,
)
from catseg_fast.data.class_list import read_class_list
from catseg_fast.distributed.torchrun import join, own_device
from catseg_fast.errors import InputError
from catseg_fast.text.class_lists import Names, read_classes, ready_list
from catseg_fast.text.fold import split_fold
from catseg_fast.text.prompts import check_classes

if TYPE_CHECKING:
    from catseg_fast.data.folder import FolderDataset
    from catseg_fast.distributed.torchrun import Processes
    from catseg_fast.evaluation.run import Evaluation
    from catseg_fast.model import CATSeg

EXAMPLES = (
    "catseg-fast eval --data ade150 --weights v2-vitl",
    "catseg-fast eval --data scenes --weights my.safetensors --backend reference --backend torch --limit 50",
    "catseg-fast eval --data scenes --backend torch --precision float32 --precision float16 --activations",
    "catseg-fast eval --data pas20b --weights v2-vitl --min-score 0.3",
    "torchrun --nproc-per-node 2 -m catseg_fast eval --data ade847 --weights v2-vitl --all-classes",
)


@dataclass(frozen=True)
class Combination:
    """A way to run a model."""

    backend: str
    dtype: str
    precision: str | None

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.backend, self.dtype, self.precision)))


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Data set: images/, annotations/ of index PNGs, and classes.json."
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W", help="Checkpoint, as for `segment`; by default those in this package."),
    ] = None,
    variant: VariantName = None,
    classes_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False,
            help="Other names for the data set's classes, in its order, then further classes; an "
            "object in a .json file can have several names of a class.",
        ),
    ] = None,
    classes_list: ClassesList = None,
    min_score: MinScore = None,
    ignore_unlabelled: Annotated[
        bool,
        typer.Option(
            "--ignore-unlabelled",
            help="Do not count pixels that --min-score leaves without a class; by default they are wrong.",
        ),
    ] = False,
    backend: Annotated[
        list[str], choice("--backend", BACKENDS, "Implementation of the aggregator, repeatable")
    ] = ["auto"],  # noqa: B006
    dtype: Annotated[
        list[str], choice("--dtype", DTYPES, "Type of the weights, repeatable")
    ] = ["float32"],  # noqa: B006
    precision: Annotated[
        list[str] | None,
        choice(
            "--precision", DTYPES,
            "Type in which the aggregator's stages compute, repeatable; by default the weights', but float16 "
            "on a GPU. The reference always computes in the weights'",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N images, by name.")
    ] = None,
    sliding_window: Annotated[
        bool,
        typer.Option(
            "--sliding-window/--whole", help="Overlapping crops and the whole picture, or only the latter."
        ),
    ] = True,
    all_classes: AllClasses = False,
    activations: Annotated[
        bool,
        typer.Option("--activations", help="Also find the largest value in each of the engine's stages."),
    ] = False,
    top: Annotated[
        int, typer.Option(metavar="N", min=0, help="Also list the N classes of lowest and of highest IoU.")
    ] = 0,
    output: Annotated[Path, output_folder("Folder of the results.")] = Path("evaluated"),
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the counts of an interrupted evaluation in --output.")
    ] = False,
    device: Device = None,
    text_cache: TextCache = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Measure a model on labelled pictures: mIoU, fwIoU, pixel accuracy, class accuracy.

    Every combination of --backend, --dtype and --precision is evaluated; labels are compared with those of
    the first one, pixel by pixel. Images are resized, and windows are cut, as in upstream's evaluation.

    Writes results.json, the first combination's label maps, and a file of counts per combination, with which
    an interrupted evaluation continues. Under torchrun, the processes share the images.
    """
    combinations = combine(backend, dtype, precision)
    if ignore_unlabelled and min_score is None:
        raise typer.BadParameter(
            "needs --min-score: without it every pixel has a class", param_hint="--ignore-unlabelled"
        )
    if classes_file is not None and classes_list is not None:
        raise typer.BadParameter("give --classes-file or this, not both", param_hint="--classes-list")
    weights = weights_or_bundled(weights, variant)
    with plain_errors(debug):
        # Checks without torch come first, as its import takes seconds.
        from catseg_fast.checkpoints.hub import resolve

        names = _class_names(data, classes_file, classes_list)
        check_classes(split_fold(names)[0])
        file = None if weights is None else resolve(weights)
        if weights == BUNDLED_WEIGHTS:
            note_on_bundled(sorted((data / "images").glob("*"))[:1])

        import torch

        from catseg_fast.data.folder import FolderDataset
        from catseg_fast.evaluation.report import (
            activations_table,
            check_target,
            classes_table,
            results_table,
            write_results,
        )
        from catseg_fast.weights import weights_hash

        target = own_device(device or str(default_device()))
        for name in backend:
            choose_backend(name, target)  # fail before anything is loaded
        dataset = FolderDataset(data, max_pixels)
        classes = tuple(names)
        written = output / "results.json"
        check_target(written)
        output.mkdir(parents=True, exist_ok=True)
        about = {
            "catseg_fast": __version__, "data_sha256": dataset.fingerprint(), "classes": list(classes),
            "sliding_window": sliding_window, "all_classes": all_classes, "activations": activations,
            "device": target.partition(":")[0],
        }  # fmt: skip
        if isinstance(names, dict):
            about["fold"] = names
        if min_score is not None:
            about |= {"min_score": min_score, "ignore_unlabelled": ignore_unlabelled}
        rows: list[tuple[dict[str, Any], Evaluation]] = []
        with join(target, objects=True) as processes:
            if restart and processes.first:  # of the label maps that are now replaced
                written.unlink(missing_ok=True)
            for combination in combinations:
                with stderr.status("Loading the model …"):
                    model = build_model(
                        file, variant, names, seed, device=target, dtype=combination.dtype,
                        sliding_window=sliding_window, backend=combination.backend, text_cache=text_cache,
                    )  # fmt: skip
                if combination.precision is not None:
                    model.engine.precision = getattr(torch, combination.precision)
                if all_classes:
                    model.max_classes = None
                own = {
                    **asdict(combination), "runs_on": choose_backend(combination.backend, target),
                    "variant": model.variant.name, "weights_sha256": weights_hash(model.state_dict()),
                }  # fmt: skip
                found = _run(
                    model, dataset, combination, combinations[0], {**about, **own}, output, limit, restart,
                    processes,
                )  # fmt: skip
                rows.append((own, found))
            if not processes.first:
                return
        given = {"data": str(data), "weights": weights, "seed": seed, "limit": limit}
        write_results(written, {**given, **about}, classes, rows)
    named = [(combination.name, found) for combination, (_, found) in zip(combinations, rows, strict=True)]
    stdout.print_table(results_table(named), names=(0,))
    for name, found in named:
        if found.activations:
            stdout.print_table(activations_table(name, found.activations), names=(0,))
    if top:
        stdout.print_table(classes_table(classes, rows[0][1], top), names=(0,))
    stdout.print(f"{rows[0][1].images} images; wrote {written}")


def combine(
    backends: Sequence[str], dtypes: Sequence[str], precisions: Sequence[str] | None
) -> list[Combination]:
    """Return all combinations; the reference has no stages, and therefore no precision of stages."""
    combinations = itertools.product(backends, dtypes, precisions or (None,))
    return list(
        dict.fromkeys(
            Combination(backend, dtype, None if backend == "reference" else precision)
            for backend, dtype, precision in combinations
        )
    )


def _class_names(data: Path, classes_file: Path | None, classes_list: str | None) -> Names:
    """Return the data set's class names, or those that the options give."""
    own, fold = read_class_list(data)
    if classes_file is None and classes_list is None:
        return list(own) if fold is None else fold.by_class
    classes = read_classes(classes_file) if classes_file else ready_list(classes_list or "").classes
    if len(classes) < len(own):
        raise InputError(
            f"{classes_file or classes_list}: {len(classes)} classes are fewer than the data set's {len(own)}"
        )
    if classes_file is not None:
        note_separators(classes, file=True)
    return classes


def _run(
    model: CATSeg, dataset: FolderDataset, combination: Combination, first: Combination,
    about: dict[str, Any], output: Path, limit: int | None, restart: bool, processes: Processes,
) -> Evaluation:  # fmt: skip
    from catseg_fast.engine.activations import record_activations
    from catseg_fast.evaluation.ledger import Ledger
    from catseg_fast.evaluation.run import evaluate, model_segmenter, summarise

    labels = output / f"{first.name}.labels"
    leading = combination == first
    ledger = Ledger(output, combination.name, {**about, "compared_with": None if leading else first.name})
    if restart:
        processes.from_first(ledger.clear)
    ignoring = about.get("ignore_unlabelled", False)
    watched = about["activations"] and combination.backend != "reference"
    recording: AbstractContextManager[dict[str, float] | None] = nullcontext()
    if watched:
        recording = record_activations(model.engine)
    with image_progress(combination.name) as advance, recording as activations:
        records = evaluate(
            dataset, model_segmenter(model, about.get("min_score")), len(model.label_classes),
            ignore_unlabelled=ignoring, limit=limit, ledger=ledger,
            save_labels=labels if leading else None, compare_labels=None if leading else labels,
            activations=activations, processes=processes, advance=advance,
        )  # fmt: skip
    return summarise(records, len(model.label_classes), ignoring)
