"""Evaluation on a labelled data set: image by image, resumable, shared by processes, exact.

Every image leaves a record of counts, all integers; what is reported is their sum. So neither an interruption
nor the number of processes changes a result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from catseg_fast.ahead import Room, ahead
from catseg_fast.data.folder import FolderDataset, read_index_map
from catseg_fast.data.resize import shortest_edge_size
from catseg_fast.distributed.torchrun import Processes
from catseg_fast.errors import InputError
from catseg_fast.evaluation.ledger import Ledger, Record
from catseg_fast.evaluation.metrics import ClassCounts
from catseg_fast.files import replacing
from catseg_fast.identity import content_digest
from catseg_fast.labels import NONE, class_indices
from catseg_fast.output.overlay import UNLABELLED_VALUE, label_png

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg

Segmenter = Callable[[Tensor], Tensor]  # image uint8 [3, H, W] to class indices [H, W]

# The size that upstream's evaluation gives images, before the model sees them.
SHORTEST, LONGEST = 640, 2560
READERS = 2  # threads that read the next images
PIXELS = 100_000_000  # of all images in memory together; one with more of them comes when there is no other


class Data(Protocol):
    """A data set to evaluate on, such as `catseg_fast.data.folder.FolderDataset`."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def ignore_label(self) -> int: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def model_segmenter(model: CATSeg, min_score: float | None = None) -> Segmenter:
    """A model's label maps as upstream evaluates it; with -1 where the best probability is below `min_score`.

    With a sliding window, the picture is first resized as upstream's loader does, with 640 pixels on its
    shorter side and at most 2560 on the longer. The whole-image path takes it as it is; see `CATSeg.segment`.
    """

    def segment(image: Tensor) -> Tensor:
        if not model.sliding_window:
            return model.segment(image, min_score=min_score).labels
        height, width = image.shape[1:]
        entry = {"image": resize_shortest(image), "height": height, "width": width}
        return model.label_map([entry], min_score=min_score)[0].labels

    return segment


def resize_shortest(image: Tensor) -> Tensor:
    """Resize uint8 `[3, H, W]` as detectron2's `ResizeShortestEdge(640, 2560)`: bilinear, by Pillow."""
    height, width = shortest_edge_size(image.shape[1], image.shape[2], SHORTEST, LONGEST)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def evaluate(
    data: Data,
    segmenter: Segmenter,
    classes: int | None = None,
    *,
    fold: Sequence[int] | None = None,
    ignore_unlabelled: bool = False,
    limit: int | None = None,
    ledger: Ledger | None = None,
    save_labels: Path | None = None,
    compare_labels: Path | None = None,
    activations: dict[str, float] | None = None,
    processes: Processes | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """Segment every image of a data set and count.

    Args:
        data: images and their labels.
        segmenter: what is evaluated: uint8 `[3, H, W]` to class indices `[H, W]`; -1 where no class fits.
        classes: number of classes that are distinguished; by default the data set's. The data set's are the
            first of them.
        fold: the class of each label of `segmenter`, where classes have several: `[0, 1, 1]` if labels 1 and
            2 are of class 1. By default labels are classes. A model that was given the names of each class
            folds by itself.
        ignore_unlabelled: whether pixels with the label -1 are left out; otherwise they are wrong answers.
        limit: number of images to evaluate; by default all.
        ledger: keeps each record; images that it has are not done again, if the label maps that were written
            and compared with are still the same.
        save_labels: folder for each image's label map, NAME.png of 16 bits.
        compare_labels: folder with label maps to compare with.
        activations: values by stage, which grow while `segmenter` runs; each record takes its own.
        processes: those among which the images are shared; by default only this one.
        advance: called with the number of images done and to be done, by this process.

    Returns:
        The records of all images, in the order of their names; `summarise` adds them up.

    Raises:
        InputError: if `classes` is fewer than the data set's, `fold` names a class that is not there, a label
            map is not of its image's size, the ledger is of another evaluation, or an image or annotation
            cannot be read.
        OSError: if a file cannot be written.
    """
    count = len(data.classes) if classes is None else classes
    if count < len(data.classes):
        raise InputError(f"classes: {count} are fewer than the data set's {len(data.classes)}")
    table = None if fold is None else _fold_table(fold, count)
    processes = processes or Processes()
    names = data.names[:limit]
    known: dict[str, Record] = {}
    if ledger is not None:
        known = processes.from_first(lambda: _valid(ledger.read(), save_labels, compare_labels))
    records = {name: known[name] for name in names if name in known}
    todo = [index for index, name in enumerate(names) if name not in known][processes.rank :: processes.count]
    advance(0, len(todo))
    if ledger is not None and todo:
        ledger.open(processes.rank)
    keeping = nullcontext() if ledger is None else closing(ledger)
    with keeping, ThreadPoolExecutor(READERS) as readers:
        jobs = ahead(readers, data.__getitem__, todo, READERS, _pixels_of(data), Room(PIXELS))
        for done, job in enumerate(jobs, 1):
            entry = job.result()
            del job  # which keeps the entry
            if activations is not None:
                activations.clear()
            start = time.perf_counter()
            labels = segmenter(entry["image"]).cpu()
            seconds = time.perf_counter() - start
            if table is not None:
                labels = table[class_indices(labels, len(table) - 1, NONE)]
            name = entry["name"]
            counts = ClassCounts.of(labels, entry["sem_seg"], count, data.ignore_label, ignore_unlabelled)
            record = {"name": name, "seconds": seconds, "counts": _sparse(counts), "pixels": labels.numel()}
            if counts.unlabelled:
                record["unlabelled"] = counts.unlabelled
            if compare_labels is not None:
                record["compared_with"] = content_digest(compare_labels / f"{name}.png")
                record["agreeing"] = _agreeing(labels, compare_labels / f"{name}.png")
            if activations is not None:
                record["activations"] = dict(activations)
            if save_labels is not None:
                record["label_map"] = _save_labels(labels, save_labels, name)
            records[name] = record
            if ledger is not None:
                ledger.add(record)
            advance(done, len(todo))
            del entry, labels  # before the next one is read, which may be large
    records = processes.gather(records)
    return [records[name] for name in names]


def _pixels_of(data: Data) -> Callable[[int], int]:
    """The pixels of a data set's images by index, where the data set can tell them before it reads them."""
    return data.pixels if isinstance(data, FolderDataset) else lambda index: 0


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        counts: pixels a class, in all images.
        images: their number.
        seconds: median time an image, as the segmenter took it.
        agreement: share of all pixels, ignored ones too, that are labelled as in what was compared with.
        activations: largest value by stage.
        unlabelled: share of the pixels that have a class in the truth and the label -1.
    """

    counts: ClassCounts
    images: int
    seconds: float
    agreement: float | None
    activations: dict[str, float]
    unlabelled: float = 0.0


def summarise(records: Sequence[Record], classes: int, ignore_unlabelled: bool = False) -> Evaluation:
    """Add up the records of `evaluate` over a list of `classes`.

    Args:
        records: of the images.
        classes: number of classes.
        ignore_unlabelled: as in `evaluate`.

    Raises:
        InputError: if there are none.
    """
    if not records:
        raise InputError("records: there are none")
    table = np.zeros((3, classes), dtype=np.int64)
    activations: dict[str, float] = {}
    for record in records:
        indices, *counts = record["counts"]
        table[:, indices] += np.array(counts, dtype=np.int64)
        for stage, value in record.get("activations", {}).items():
            activations[stage] = max(activations.get(stage, 0.0), value)
    agreement = None
    if all("agreeing" in record for record in records):
        agreement = sum(record["agreeing"] for record in records) / sum(
            record["pixels"] for record in records
        )
    unlabelled = sum(record.get("unlabelled", 0) for record in records)
    pixels = int(table[1].sum()) + unlabelled * ignore_unlabelled
    return Evaluation(
        ClassCounts(*map(torch.from_numpy, table), unlabelled=unlabelled),
        len(records),
        statistics.median(record["seconds"] for record in records),
        agreement,
        activations,
        unlabelled / pixels if pixels else 0.0,
    )


def _fold_table(fold: Sequence[int], classes: int) -> Tensor:
    """The class of each label, and of -1 behind them, which a negative index finds."""
    if not len(fold):
        raise InputError("fold: it is empty; give the class of each label")
    for label, index in enumerate(fold):
        if not 0 <= index < classes:
            raise InputError(f"fold: label {label} goes to class {index}, and there are {classes} classes")
    return torch.tensor([*fold, NONE], dtype=torch.int64)


def _sparse(counts: ClassCounts) -> list[list[int]]:
    """The indices of classes that occur, and their intersection, truth and predicted."""
    table = torch.stack([counts.intersection, counts.truth, counts.predicted])
    indices = table.any(dim=0).nonzero()[:, 0]
    return [indices.tolist(), *table[:, indices].tolist()]


def _agreeing(labels: Tensor, path: Path) -> int:
    other = read_index_map(path, None)
    if other.shape != labels.shape:
        raise InputError(
            f"{path}: a label map {list(other.shape)} to compare with one of {list(labels.shape)}"
        )
    stored = labels.long()
    stored = stored.masked_fill(stored == NONE, UNLABELLED_VALUE)  # as `label_png` has it
    return int((stored.numpy() == other).sum())


def _save_labels(labels: Tensor, folder: Path, name: str) -> str:
    """Write an image's label map; return the digest of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.png"
    with replacing(target) as path:
        label_png(labels).save(path, format="PNG")
    return content_digest(target)


def _valid(records: dict[str, Record], saved: Path | None, compared: Path | None) -> dict[str, Record]:
    """The records whose label maps, in these folders, are the ones that they are about."""
    folders = [(key, folder) for key, folder in (("label_map", saved), ("compared_with", compared)) if folder]
    return {
        name: record
        for name, record in records.items()
        if all(record.get(key) == _digest(folder / f"{name}.png") for key, folder in folders)
    }


def _digest(path: Path) -> str:
    """The digest of a file; empty if it cannot be read."""
    try:
        return content_digest(path)
    except (OSError, ValueError):
        return ""
