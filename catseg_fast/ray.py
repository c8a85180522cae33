"""Segmentation of a Ray dataset: each actor holds a model, on this machine or on a cluster."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any, Literal

from catseg_fast.errors import InputError, InputTypeError, MissingPackageError
from catseg_fast.inference.images import load_pixels
from catseg_fast.labels import check_min_score
from catseg_fast.model import CATSeg
from catseg_fast.numeric import whole
from catseg_fast.output.overlay import label_png
from catseg_fast.output.results import summarise
from catseg_fast.text.fold import ClassNames

try:
    import ray
    from ray.data import ActorPoolStrategy, Dataset
except ImportError as error:
    raise MissingPackageError('catseg_fast.ray needs Ray: pip install "catseg-fast[ray]"') from error

Source = str | os.PathLike[str] | Callable[[], CATSeg]

# Where a row's picture is looked for, and whether the column is worth keeping behind it.
COLUMNS = {"image": False, "bytes": False, "path": True}
LABELS = ("png", "array")
ON_ERROR = ("raise", "record")


def segment_dataset(
    ds: Dataset,
    source: Source,
    classes: ClassNames | None = None,
    *,
    column: str | None = None,
    labels: Literal["png", "array"] = "png",
    on_error: Literal["raise", "record"] = "raise",
    sliding_window: bool | None = None,
    min_score: float | None = None,
    actors: int = 1,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **options: Any,
) -> Dataset:
    """Segment every row's picture; as lazy as `ds`.

    Args:
        ds: rows with a picture: an array `[H, W, 3]` in "image", a file's content in "bytes", or its path, on
            file systems that every node sees, in "path"; the first of these that a row has.
        source: what `CATSeg.from_pretrained` takes, seen from every node; or a function that builds a model.
        classes: class names; those of the model that the function builds where None.
        column: the picture's column, where it has another name; it must hold what one of these does.
        labels: "png", a file's content with 16 bits a pixel; or "array", int32 `[H, W]`.
        on_error: what to do about a picture that cannot be read: "raise", or "record" it and continue.
        sliding_window: as in `CATSeg.segment`.
        min_score: as in `CATSeg.segment`; pixels of no class are 65535 in PNGs, and an entry of "classes" of
            the index -1.
        actors: models at a time.
        num_cpus: CPUs of each; on a CPU a model uses as many threads.
        num_gpus: GPUs of each; by default 1 where the cluster has any.
        **options: further arguments of `CATSeg.from_pretrained`.

    Returns:
        The rows' other columns ("path" among them) with "labels"; "mean_score", of the labels' scores; and
        "classes", those in the picture: their index, name, share of the pixels and mean score. With
        on_error="record" also "error", None where all went well; else the three others are None.

    Raises:
        TypeError, ValueError: from a bad argument. Other errors are raised where the dataset is consumed.
    """
    for name, value, allowed in (("labels", labels, LABELS), ("on_error", on_error, ON_ERROR)):
        if value not in allowed:
            raise InputError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
    whole(actors, "actors")
    if min_score is not None:
        check_min_score(min_score)
    if callable(source) and options:
        raise InputTypeError(
            f"{min(options)}: is for from_pretrained; the function builds the model by itself"
        )
    if num_gpus is None:
        num_gpus = min(1, ray.cluster_resources().get("GPU", 0))
    return ds.map(
        _Segmenter,
        fn_constructor_args=(source, classes, options, column, labels, on_error, sliding_window, min_score),
        compute=ActorPoolStrategy(size=actors),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


class _Segmenter:
    """An actor: a model, called with one row after the other; arguments as in `segment_dataset`."""

    def __init__(
        self,
        source: Source,
        classes: ClassNames | None,
        options: dict[str, Any],
        column: str | None,
        labels: str,
        on_error: str,
        sliding_window: bool | None,
        min_score: float | None = None,
    ) -> None:
        if callable(source):
            self.model = source()
            if classes is not None:
                self.model.set_classes(classes)
        else:
            self.model = CATSeg.from_pretrained(source, classes, **options)
        self.column, self.labels, self.on_error = column, labels, on_error
        self.sliding_window, self.min_score = sliding_window, min_score

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        column = self.column or next((name for name in COLUMNS if name in row), None)
        if column is None or column not in row:
            raise InputError(f"column: a row has {', '.join(row)}, not {column or ' or '.join(COLUMNS)}")
        kept = {name: value for name, value in row.items() if name != column or COLUMNS.get(name, True)}
        try:
            image = load_pixels(row[column], column, self.model.max_pixels)
        except (OSError, TypeError, ValueError) as error:
            if self.on_error == "raise":
                raise
            return {**kept, "labels": None, "mean_score": None, "classes": None, "error": str(error)}
        segmentation = self.model.segment(image, sliding_window=self.sliding_window, min_score=self.min_score)
        kept["labels"] = segmentation.labels.numpy()
        if self.labels == "png":
            file = io.BytesIO()
            label_png(segmentation.labels).save(file, "PNG")
            kept["labels"] = file.getvalue()
        kept["mean_score"] = segmentation.scores.double().mean().item()
        kept["classes"] = [entry for entry in summarise(segmentation) if entry["share"]]
        return kept if self.on_error == "raise" else {**kept, "error": None}
