"""Large pictures at their own resolution: overlapping tiles, each segmented as a picture, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from catseg_fast.errors import InputError, RunError
from catseg_fast.inference.encoding import encode
from catseg_fast.inference.readout import READOUT_BYTES, LabelMap, Readout
from catseg_fast.inference.segment import label
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.numeric import flag, whole

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg

# Reads pixels [3, height, width] in 0..255 at a (top, left) corner.
Read = Callable[[int, int, int, int], Tensor]


@dataclass(frozen=True)
class TileGrid:
    """Square tiles over a picture; the last row and column end at its border, as crops do.

    Args:
        size: (height, width) of the picture.
        tile: side of a tile in pixels; a side of the picture that is shorter makes the tiles narrower.
        overlap: pixels that a tile shares with the next one, at most half of it.
    """

    size: tuple[int, int]
    tile: int
    overlap: int

    def __post_init__(self) -> None:
        whole(self.tile, "tiles")
        if not 0 <= whole(self.overlap, "overlap", None) <= self.tile // 2:
            raise InputError(
                f"overlap: {self.overlap} is not in 0..{self.tile // 2}, half of a tile of {self.tile}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of each tile."""
        height, width = (min(self.tile, side) for side in self.size)
        return height, width

    @property
    def tops(self) -> list[int]:
        """The first row of each row of tiles."""
        return self._starts(self.size[0])

    @property
    def lefts(self) -> list[int]:
        """The first column of each column of tiles."""
        return self._starts(self.size[1])

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.tops) * len(self.lefts)

    def _starts(self, length: int) -> list[int]:
        rest = length - min(self.tile, length)
        starts = list(range(0, rest + 1, self.tile - self.overlap))
        return starts if starts[-1] == rest else [*starts, rest]


def default_overlap(tile: int) -> int:
    """The overlap where none is given: an eighth of a tile."""
    return tile // 8


class TileStore(Protocol):
    """Keeps tiles' logits `[B, T, h, w]`, by row and column of the tile, until they are dropped."""

    def get(self, row: int, column: int) -> Tensor | None:
        """The logits, on the CPU; None if they are not there."""

    def put(self, row: int, column: int, logits: Tensor) -> None:
        """Keep logits."""

    def drop(self, rows: int) -> None:
        """Forget the tiles of the first `rows` rows."""


class MemoryStore:
    """Keeps logits in memory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], Tensor] = {}

    def get(self, row: int, column: int) -> Tensor | None:
        return self._kept.get((row, column))

    def put(self, row: int, column: int, logits: Tensor) -> None:
        self._kept[row, column] = logits

    def drop(self, rows: int) -> None:
        self._kept = {place: logits for place, logits in self._kept.items() if place[0] >= rows}


@dataclass(frozen=True)
class Band:
    """Labels int32 and scores float32 `[h, W]` of a picture's next rows, on the CPU."""

    labels: Tensor
    scores: Tensor


def check_tiles(model: CATSeg, tile: int) -> None:
    """Check that a model can segment tiles.

    Raises:
        InputError: if they are smaller than the crops that it looks at.
        RunError: if its classes are split over ranks.
    """
    if tile < model.window.crop_size:
        raise InputError(
            f"tiles: {tile} is smaller than the model's window of {model.window.crop_size} pixels: "
            "tiles would be enlarged"
        )
    if model.engine.share is not None:
        raise RunError("class parallel: no rank has all logits, which tiles need")


def label_bands(
    model: CATSeg,
    grid: TileGrid,
    read: Read,
    store: TileStore,
    *,
    sliding_window: bool | None = None,
    min_score: float | None = None,
    first: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Iterator[Band]:
    """Label a picture from top to bottom, in bands between the tops of two rows of tiles.

    Where tiles overlap, their probabilities are averaged, as those of crops are. Memory does not grow with
    the picture but for a band.

    Args:
        model: has its classes.
        grid: the tiles.
        read: reads the picture.
        store: keeps the logits of tiles; those that it has are not computed again.
        sliding_window, min_score: as of `CATSeg.segment`, for each tile and for the averages.
        first: the band to start with.
        progress: called with the numbers of tiles done and of all tiles.

    Raises:
        InputError, RunError: as of `check_tiles`.
    """
    check_tiles(model, grid.tile)
    sliding = flag(model.sliding_window if sliding_window is None else sliding_window, "sliding_window")
    tops, lefts = grid.tops, grid.lefts
    readout = Readout(grid.shape, model.window if sliding else None)

    def logits(row: int, column: int) -> Tensor:
        kept = store.get(row, column)
        if kept is None:
            kept = _tile_logits(model, read(tops[row], lefts[column], *grid.shape), readout)
            store.put(row, column, kept)
        return kept

    progress(first * len(lefts), grid.count)
    for row in range(first, len(tops)):
        bottom = tops[row + 1] if row + 1 < len(tops) else grid.size[0]
        parts = []
        for column in range(len(lefts)):
            logits(row, column)
            right = lefts[column + 1] if column + 1 < len(lefts) else grid.size[1]
            cell = (tops[row], bottom, lefts[column], right)
            target = _label_cell(model, grid, readout, logits, cell)
            part = Segmentation.of(target, model.classes, readout, fold=model.fold)
            parts.append(part.drop_below(min_score))
            progress(row * len(lefts) + column + 1, grid.count)
        labels, scores = ([getattr(part, name) for part in parts] for name in ("labels", "scores"))
        yield Band(torch.cat(labels, dim=1), torch.cat(scores, dim=1))
        store.drop(next((i for i, top in enumerate(tops) if top + grid.shape[0] > bottom), len(tops)))


def _tile_logits(model: CATSeg, pixels: Tensor, readout: Readout) -> Tensor:
    """A tile's logits `[B, T, h, w]`, on the CPU."""
    pixels = pixels.to(model.device, torch.float32)
    logits = label(model, encode(model, [pixels], [readout]), None, keep_logits=True)[0].logits
    assert logits is not None
    return logits


@torch.no_grad()
def _label_cell(
    model: CATSeg,
    grid: TileGrid,
    readout: Readout,
    logits: Callable[[int, int], Tensor],
    cell: tuple[int, int, int, int],
) -> LabelMap:
    """Label the pixels of a cell (top, bottom, left, right), at whose corner the last tile over it starts."""
    top, bottom, left, right = cell
    height, width = grid.shape
    rows = [i for i, start in enumerate(grid.tops) if start <= top and start + height > top]
    columns = [j for j, start in enumerate(grid.lefts) if start <= left and start + width > left]
    target = LabelMap((bottom - top, right - left), model.device)
    step = max(1, READOUT_BYTES // readout.class_bytes)
    for start in range(0, len(model.classes), step):
        part = slice(start, min(start + step, len(model.classes)))
        total = torch.zeros(part.stop - start, bottom - top, right - left, device=model.device)
        count = torch.zeros(bottom - top, right - left, device=model.device)
        for i in rows:
            for j in columns:
                maps = readout(logits(i, j)[:, part].to(model.device))
                y, x = top - grid.tops[i], left - grid.lefts[j]
                seen = maps[:, y : y + bottom - top, x : x + right - left]
                total[:, : seen.shape[1], : seen.shape[2]] += seen
                count[: seen.shape[1], : seen.shape[2]] += 1
        target.update(start, total / count)
    return target


def segment_tiles(
    model: CATSeg,
    pixels: Tensor,
    tile: int,
    overlap: int | None = None,
    *,
    sliding_window: bool | None = None,
    min_score: float | None = None,
) -> Segmentation:
    """Label a picture `[3, H, W]` in memory, as `label_bands` does.

    Raises:
        InputError, RunError: as of `TileGrid` and `check_tiles`.
    """
    size, tile = (pixels.shape[1], pixels.shape[2]), whole(tile, "tiles")
    grid = TileGrid(size, tile, default_overlap(tile) if overlap is None else overlap)

    def read(top: int, left: int, height: int, width: int) -> Tensor:
        return pixels[:, top : top + height, left : left + width]

    bands = list(
        label_bands(
            model, grid, read, MemoryStore(), sliding_window=sliding_window, min_score=min_score
        )
    )  # fmt: skip
    labels, scores = torch.cat([band.labels for band in bands]), torch.cat([band.scores for band in bands])
    return Segmentation(labels, scores, model.label_classes, fold=model.fold, min_score=min_score)
