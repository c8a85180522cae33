"""Label maps from logits, by chunks of classes: no tensor grows with the number of classes.

Every operation before the maximum (sigmoid, resizes, averages of crops) treats each class separately, so that
the result equals the argmax over all classes at once, ties included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.kernels.label_map import plain
from catseg_fast.reference.inference import SlidingWindow

Size = tuple[int, int]

# Working memory for the classes that are read out at a time.
READOUT_BYTES = 2**26
# Of a pixel and class: its probability, twice while it is made, the maximum, its index, and what is chosen.
_PIXEL_BYTES = 32
ALL = slice(None)


@dataclass(frozen=True)
class Readout:
    """Conversion of crops' logits `[B, t, h, w]` to probabilities `[t, height, width]` of a picture.

    Attributes:
        size: (height, width) of the answer.
        window: the sliding window that cut the crops; None for one crop that is the whole image.
        visible: rows and columns of the whole image's map that count, the others being cut off.
    """

    size: Size
    window: SlidingWindow | None = None
    visible: Size | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        visible = self.visible or tuple(logits.shape[2:])
        return plain.read_out(logits.float(), self.size, self.description, visible)

    def strips(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows, some at a time, and their probabilities `[t, rows, width]`.

        A large picture comes in several strips: they add up to the whole map, but for rounding.
        """
        height, width = self.size
        if not self._in_strips:
            yield slice(0, height), self(logits)
            return
        visible = self.visible or tuple(logits.shape[2:])
        coarse = plain.coarse_probabilities(logits.float(), self.description, visible)
        size = (coarse.shape[1], width)
        wide = F.interpolate(coarse[None], size=size, mode="bilinear", align_corners=False)[0]
        for rows in self.rows:
            yield rows, plain.resize_rows(wide, height, rows)

    @property
    def rows(self) -> list[slice]:
        """The rows of each strip."""
        height, width = self.size
        step = height
        if self._in_strips:
            step = max(1, READOUT_BYTES // (_PIXEL_BYTES * width))
        return [slice(start, min(start + step, height)) for start in range(0, height, step)]

    @property
    def _in_strips(self) -> bool:
        return self._whole_bytes > READOUT_BYTES

    @property
    def description(self) -> tuple[int, ...]:
        """The window as the ops take it: resolution, side of a crop and stride; empty without one."""
        if self.window is None:
            return ()
        return (*self.window.resolution, self.window.crop_size, self.window.stride)

    @property
    def class_bytes(self) -> int:
        """Working memory for one class: its maps at every size on the way, twice where one makes another."""
        if not self._in_strips:
            return self._whole_bytes
        rows = self.window.resolution[0] if self.window is not None else max(self.visible or (0,))
        return self._coarse_bytes + 4 * rows * self.size[1] + READOUT_BYTES

    @property
    def _coarse_bytes(self) -> int:
        if self.window is None:
            return 0
        side, (height, width) = self.window.crop_size, self.window.resolution
        return 4 * (2 * self.window.count * side**2 + 3 * height * width)

    @property
    def _whole_bytes(self) -> int:
        """Working memory for one class where all rows come at once."""
        return 12 * self.size[0] * self.size[1] + self._coarse_bytes


class Target(Protocol):
    """A consumer of probabilities; it changes nothing before the last step that can fail."""

    def reset(self) -> None:
        """Discard all probabilities."""

    def update(self, first: int, probabilities: Tensor, rows: slice = ALL) -> None:
        """Add `probabilities [t, H, W]` of classes `first`, `first + 1`, …; chunks come in order.

        Args:
            first: number of the first class.
            probabilities: of all rows, or of some of them, `[t, rows, W]`.
            rows: which ones.
        """


def reader(readout: Readout, target: Target, backend: str = "torch") -> Callable[[slice, Tensor], None]:
    """Return a consumer of `Engine.stream` that reads logits out into a reset target, few classes at a time.

    If memory runs out in between, and the chunk comes again, nothing is taken in twice.
    A label map on the back end "triton" is read out by a kernel.
    """
    target.reset()
    if backend == "triton" and isinstance(target, LabelMap):
        return partial(_update_by_kernel, readout, target)
    step = max(1, READOUT_BYTES // readout.class_bytes)
    taken = [0] * len(readout.rows)  # classes, by strip

    def consume(classes: slice, logits: Tensor) -> None:
        for start in range(max(min(taken), classes.start), classes.stop, step):
            stop = min(start + step, classes.stop)
            part = slice(start - classes.start, stop - classes.start)
            for index, (rows, probabilities) in enumerate(readout.strips(logits[:, part])):
                first = max(start, taken[index])
                if first < stop:
                    target.update(first, probabilities[first - start :], rows)
                    taken[index] = stop

    return consume


def _update_by_kernel(readout: Readout, target: LabelMap, classes: slice, logits: Tensor) -> None:
    """Compute `target.update(classes.start, readout(logits))` by a kernel, completely or not at all."""
    from catseg_fast.kernels.label_map.op import update_label_map  # triton exists for Linux only

    visible = readout.visible or tuple(logits.shape[2:])
    target.scores, target.labels = update_label_map(
        logits, target.scores, target.labels, classes.start, readout.description, visible
    )


def read_all(
    readouts: Sequence[Readout],
    targets: Sequence[Target],
    crops: Sequence[int],
    backend: str,
    store: LogitStore | None = None,
) -> Callable[[slice, Tensor], None]:
    """Return a `reader` of several pictures, `crops` each, that also adds the logits to a store, if given."""
    readers = [reader(*pair, backend) for pair in zip(readouts, targets, strict=True)]

    def consume(classes: slice, logits: Tensor) -> None:
        if store is not None:
            store.put(classes, logits)
        for read, part in zip(readers, logits.split(list(crops)), strict=True):
            read(classes, part)

    return consume


class LogitStore:
    """The crops' logits of T classes, on the CPU, in the type in which they come.

    Attributes:
        logits: `[B, T, h, w]`, from the first chunk on.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.logits: Tensor | None = None

    def put(self, classes: slice, logits: Tensor) -> None:
        if self.logits is None or self.logits.dtype != logits.dtype:
            shape = (logits.shape[0], self.classes, *logits.shape[2:])
            self.logits = torch.empty(shape, dtype=logits.dtype)
        self.logits[:, classes] = logits.detach()


class Probabilities:
    """All probabilities `[T, H, W]`: upstream's answer."""

    def __init__(self, classes: int, size: Size, device: torch.device) -> None:
        self.maps = torch.empty(classes, *size, device=device)

    def reset(self) -> None:
        """Do nothing, as every map is written."""

    def update(self, first: int, probabilities: Tensor, rows: slice = ALL) -> None:
        self.maps[first : first + len(probabilities), rows] = probabilities


class LabelMap:
    """The best class of each pixel and its probability; the first among equal ones.

    Attributes:
        scores: float32 `[H, W]`.
        labels: int32 `[H, W]`.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.scores = torch.full(size, -1.0, device=device)
        self.labels = torch.zeros(size, dtype=torch.int32, device=device)

    def reset(self) -> None:
        self.scores.fill_(-1)
        self.labels.zero_()

    def update(self, first: int, probabilities: Tensor, rows: slice = ALL) -> None:
        scores, labels = plain.best_classes(probabilities, self.scores[rows], self.labels[rows], first)
        self.scores[rows], self.labels[rows] = scores, labels


class TopClasses:
    """The k best classes of each pixel and their probabilities, best first; in order among equal ones.

    Args:
        count: k.
        size: (height, width) of the map.
        device: where it is.
        owners: the class of each name that is taken in, ascending, where classes have several names or not
            all are taken in; by default each name is a class.

    Attributes:
        scores: float32 `[k, H, W]`; -1 where fewer than k classes were taken in.
        labels: int32 `[k, H, W]`; -1 there.
    """

    def __init__(
        self, count: int, size: Size, device: torch.device, owners: Sequence[int] | None = None
    ) -> None:
        self.count, self.owners = count, owners
        self.scores = torch.empty(count, *size, device=device)
        self.labels = torch.empty(count, *size, dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        self.scores.fill_(-1)
        self.labels.fill_(-1)
        self._taken: dict[int, tuple[int, int]] = {}  # of a strip: the next name, and the last class

    def update(self, first: int, probabilities: Tensor, rows: slice = ALL) -> None:
        """Do as `Target.update`, strip by strip: what comes again is not taken in twice."""
        _, height, width = self.scores.shape
        start, stop, _ = rows.indices(height)
        step = max(1, READOUT_BYTES // (_PIXEL_BYTES * (self.count + 1) * width))
        for top in range(start, stop, step):
            strip = slice(top, min(top + step, stop))
            following, last = self._taken.get(top, (0, -1))
            new = probabilities[max(0, following - first) :, top - start : strip.stop - start]
            if len(new):
                last = self._take(max(first, following), new, strip, last)
                self._taken[top] = (first + len(probabilities), last)

    def _take(self, first: int, probabilities: Tensor, rows: slice, last: int) -> int:
        """Take some rows in, of which the class `last` was the last one; return the one that is now."""
        names = range(first, first + len(probabilities))
        owners = list(names) if self.owners is None else [self.owners[name] for name in names]
        classes = list(dict.fromkeys(owners))
        if len(classes) < len(owners):
            parts = probabilities.split([owners.count(label) for label in classes])
            probabilities = torch.stack([part.amax(dim=0) for part in parts])
        scores, labels = self.scores[:, rows], self.labels[:, rows]
        if classes[0] == last:  # further names of a class that is among the best, or was
            entry = labels == last
            before = scores.masked_fill(~entry, -torch.inf).amax(dim=0)
            probabilities = torch.cat([probabilities[:1].maximum(before), probabilities[1:]])
            scores = scores.masked_fill(entry, -torch.inf)  # comes last, and is cut off
        indices = labels.new_tensor(classes)[:, None, None].expand_as(probabilities)
        scores, order = torch.cat([scores, probabilities]).sort(dim=0, descending=True, stable=True)
        labels = torch.cat([labels, indices]).gather(0, order[: self.count])
        self.scores[:, rows], self.labels[:, rows] = scores[: self.count], labels
        return classes[-1]
