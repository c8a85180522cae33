"""Large pictures tile by tile, from file to file; an interrupted run continues with the next tile."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from catseg_fast.cli.batch import Outcome, occurring
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.resume import finished
from catseg_fast.data.raster import Raster, open_raster
from catseg_fast.errors import InputError
from catseg_fast.files import locked, replacing, temporary_folder
from catseg_fast.identity import content_digest, place_digest, place_of, png_mark, settings_digest
from catseg_fast.inference.images import check_upright
from catseg_fast.inference.tiles import TileGrid, check_tiles, label_bands
from catseg_fast.labels import NONE
from catseg_fast.output.overlay import UNLABELLED_VALUE, overlay
from catseg_fast.output.ownership import TILED_SUFFIXES
from catseg_fast.output.results import put_in_place, require_ours, vouched
from catseg_fast.output.totals import Totals

if TYPE_CHECKING:
    from catseg_fast.cli.labelling import Labelling
    from catseg_fast.model import CATSeg

PREVIEW_SIDE = 2048  # of the overlay
STATE = "state.json"


@dataclass(frozen=True)
class Tiles:
    """Segments large pictures in tiles and saves the results.

    `STEM.labels.tif` is the label map at full size, `STEM.overlay.png` a reduced overlay, `STEM.json` a
    summary. What is under way is in the hidden folder `.STEM.tiles`.

    Args:
        model: has its classes.
        asked: what is asked for; its model is not used.
        about: as of `catseg_fast.cli.batch.Batch`.
        tile: side of a tile.
        overlap: pixels that neighbours share.
        alpha: share of the colours in the overlay.
        overwrite: also do pictures whose results are up to date.
    """

    model: CATSeg
    asked: Labelling
    about: Mapping[str, Any]
    tile: int
    overlap: int
    alpha: float = 0.55
    overwrite: bool = False

    def run(self, index: int, picture: Picture, advance: Callable[[int, int], object]) -> Outcome:
        """Segment a picture.

        Args:
            index: the outcome's.
            picture: the file.
            advance: called with the tiles done and the number of all tiles.
        """
        settings = {"tiles": self.tile, "overlap": self.overlap, "fingerprint": self.about["fingerprint"]}
        fingerprint = settings_digest(settings)
        start = time.perf_counter()
        try:
            check_tiles(self.model, self.tile)
            content = None if self.overwrite else finished(picture, fingerprint, TILED_SUFFIXES)
            if content:
                if (_folder(picture) / STATE).exists():  # of a run that was killed when it was done
                    with locked(_folder(picture), seconds=1):
                        _remove(_folder(picture))
                return Outcome(index, picture, occurring(content["classes"]))
            check_upright(picture.path)
            digest = content_digest(picture.path)  # first: if the file changes meanwhile, it is another one
            about = {"image": str(picture.path), **self.about, **settings, "fingerprint": fingerprint}
            with open_raster(picture.path) as raster:
                summary = self._segment(raster, picture, about, digest, advance)
        except Exception as error:
            return Outcome(index, picture, error=error)
        return Outcome(index, picture, occurring(summary), time.perf_counter() - start)

    def _segment(
        self,
        raster: Raster,
        picture: Picture,
        about: dict[str, Any],
        digest: str,
        advance: Callable[[int, int], object],
    ) -> list[dict[str, Any]]:
        picture.folder.mkdir(parents=True, exist_ok=True)
        require_ours(picture.folder, picture.stem, picture.path)
        grid = TileGrid(raster.size, self.tile, self.overlap)
        totals = Totals(self.model.label_classes, self.asked.min_score is not None)
        folder = _folder(picture)
        with locked(folder, seconds=1):
            work = _Work(folder, settings_digest({**about, "content": digest}), grid, totals)
            bands = label_bands(
                self.model, grid, raster.read, work,
                min_score=self.asked.min_score, first=work.bands, progress=advance,
            )  # fmt: skip
            for band in bands:
                work.append(band.labels, band.scores)
            self._write(raster, picture, about, digest, work)
            _remove(folder)
        return work.totals.summary(self.asked.present or 0)

    def _write(
        self, raster: Raster, picture: Picture, about: dict[str, Any], digest: str, work: _Work
    ) -> None:
        """Make the results of the finished label map."""
        (height, width), labels = raster.size, work.labels()
        names = [picture.stem + suffix for suffix in TILED_SUFFIXES]
        factor = math.ceil(max(height, width) / PREVIEW_SIDE)
        small = labels[: height // factor * factor, : width // factor * factor]
        small = small[factor // 2 :: factor, factor // 2 :: factor].astype(np.int32)
        small[small == UNLABELLED_VALUE] = NONE
        mark = place_digest(picture.path)
        with temporary_folder(picture.folder) as scratch:
            painted = overlay(
                raster.preview(factor), torch.from_numpy(small), self.model.label_classes, self.alpha,
                present=self.asked.present or 0.0,
            )  # fmt: skip
            painted.save(scratch / names[0], pnginfo=png_mark(mark))
            raster.write_labels(scratch / names[1], labels, mark)
            identity = {"path": place_of(picture.path), "content": digest, **vouched(scratch, names)}
            content = {
                **about, "identity": identity, "width": width, "height": height,
                **self.asked.described, "classes": work.totals.summary(self.asked.present or 0),
            }  # fmt: skip
            put_in_place(scratch, picture.folder, picture.stem, names, content, picture.path)


class _Work:
    """State of an unfinished picture: label rows, sums, and the logits of tiles that are still needed.

    Attributes:
        bands: the bands that are done.
        totals: their sums.
    """

    def __init__(self, folder: Path, key: str, grid: TileGrid, totals: Totals) -> None:
        self.folder, self.key, self.grid, self.totals, self.bands = folder, key, grid, totals, 0
        self._rows, self._state = folder / "labels.raw", folder / STATE
        if not self._restore():
            if folder.exists() and any(folder.iterdir()) and not self._state.exists():
                raise InputError(f"{folder} is there, and is not of catseg-fast; move it away")
            _remove(folder)
            self._begin()
        with self._rows.open("rb+") as file:  # what a killed run has begun to write
            file.truncate(2 * self._height * grid.size[1])

    @property
    def _height(self) -> int:
        """Rows of pixels that are done."""
        tops = self.grid.tops
        return tops[self.bands] if self.bands < len(tops) else self.grid.size[0]

    def _restore(self) -> bool:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            if state["key"] != self.key:
                return False
            self.bands = state["bands"]
            self.totals.restore(state["totals"])
            return self._rows.stat().st_size >= 2 * self._height * self.grid.size[1]
        except (OSError, ValueError, KeyError):
            return False

    def _begin(self) -> None:
        """Make the folder, with its files in it."""
        with temporary_folder(self.folder.parent) as scratch:
            new = scratch / self.folder.name
            new.mkdir()
            (new / self._rows.name).touch()
            self._write_state(new / self._state.name)
            os.replace(new, self.folder)

    def _save(self) -> None:
        with replacing(self._state) as temporary:
            self._write_state(temporary)

    def _write_state(self, path: Path) -> None:
        state = {"key": self.key, "bands": self.bands, "totals": self.totals.state()}
        path.write_text(json.dumps(state), encoding="utf-8")

    def append(self, labels: Tensor, scores: Tensor) -> None:
        """Add the next band's labels and scores `[h, W]`."""
        with self._rows.open("ab") as file:
            file.write(labels.numpy().astype(np.uint16).tobytes())  # -1 becomes 65535
        self.totals.add(labels, scores)
        self.bands += 1
        self._save()

    def labels(self) -> np.ndarray:
        """The label map uint16 `[H, W]`, mapped from its file."""
        return np.memmap(self._rows, np.uint16, "r", shape=self.grid.size)

    def get(self, row: int, column: int) -> Tensor | None:
        """A tile's logits, mapped from their file; None if there are none, or they are damaged."""
        try:
            array = np.load(self._file(row, column), mmap_mode="c")
        except (OSError, ValueError, EOFError):
            return None
        return torch.from_numpy(array)

    def put(self, row: int, column: int, logits: Tensor) -> None:
        """Keep a tile's logits; numpy has no bf16."""
        array = (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()
        path = self._file(row, column)
        with temporary_folder(self.folder) as scratch:
            np.save(scratch / path.name, array)
            os.replace(scratch / path.name, path)

    def drop(self, rows: int) -> None:
        """Remove the logits of the first rows of tiles."""
        for path in self.folder.glob("logits-*.npy"):
            if int(path.stem.split("-")[1]) < rows:
                path.unlink()

    def _file(self, row: int, column: int) -> Path:
        return self.folder / f"logits-{row}-{column}.npy"


def _folder(picture: Picture) -> Path:
    """The folder of unfinished work."""
    return picture.folder / f".{picture.stem}.tiles"


def _remove(folder: Path) -> None:
    """Remove the folder of unfinished work, if there is one, atomically."""
    if folder.exists():
        with temporary_folder(folder.parent) as scratch:
            os.replace(folder, scratch / folder.name)
