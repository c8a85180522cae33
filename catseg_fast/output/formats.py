"""Results in other tools' formats: palette PNG, binary masks, COCO JSON; the registry of `--format`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from catseg_fast.errors import InputError
from catseg_fast.identity import png_mark
from catseg_fast.imports import require_outlines, require_pycocotools
from catseg_fast.output.coco import write_polygons, write_rle
from catseg_fast.output.colours import palette

UNLABELLED = 255  # in a palette PNG, as in Pascal VOC


@dataclass(frozen=True)
class Labelled:
    """Inputs of a format's writer.

    Attributes:
        labels: indices into `classes` `[H, W]`; negative ones belong to no class.
        classes: the class names.
        file_name: the picture's.
        mark: the value of the mark that identifies the picture of the result.
    """

    labels: NDArray[np.integer]
    classes: tuple[str, ...]
    file_name: str
    mark: str

    def present(self) -> list[int]:
        """The classes that occur."""
        return [int(index) for index in np.unique(self.labels) if index >= 0]


@dataclass(frozen=True)
class Format:
    """Writer of a result's file, or folder of files.

    Attributes:
        suffix: end of its name, after the stem.
        write: writes it to a path.
        check: raises if it cannot be written for a number of classes.
    """

    suffix: str
    write: Callable[[Path, Labelled], None]
    check: Callable[[int], None]


def check_formats(names: Sequence[str], classes: int) -> None:
    """Check that results can be written in formats.

    Raises:
        InputError: if there is no such format, or it cannot hold this many classes.
        MissingPackageError: if it needs a package that is not installed.
    """
    for name in names:
        if name not in FORMATS:
            raise InputError(f"formats: {name!r} is not one of {', '.join(FORMATS)}")
        FORMATS[name].check(classes)


def _write_palette(path: Path, labelled: Labelled) -> None:
    labels = labelled.labels
    if (labels < 0).any() and len(labelled.classes) > UNLABELLED:
        raise InputError(
            f"formats: palette: {len(labelled.classes)} classes leave no index for pixels of none"
        )
    picture = Image.fromarray(np.where(labels < 0, UNLABELLED, labels).astype(np.uint8))
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(labelled.classes)] = palette(labelled.classes)
    picture.putpalette(colours.tobytes())
    picture.save(path, pnginfo=png_mark(labelled.mark))


def _check_palette(classes: int) -> None:
    if classes > 256:
        raise InputError(
            f"formats: palette: a palette holds 256 classes, got {classes}; NAME.labels.png holds more"
        )


def _write_masks(path: Path, labelled: Labelled) -> None:
    path.mkdir()
    for index in labelled.present():
        mask = Image.fromarray(labelled.labels == index)
        mask.save(path / mask_name(index, labelled.classes[index]), pnginfo=png_mark(labelled.mark))


def mask_name(index: int, name: str) -> str:
    """The name of a class's mask: its index, and the first of its names as far as file systems take it."""
    word = re.sub(r"[^\w-]+", "-", name.partition(",")[0]).strip("-")
    return f"{index}-{word.encode()[:60].decode(errors='ignore')}.png"


FORMATS = {
    "palette": Format(".palette.png", _write_palette, _check_palette),
    "masks": Format(".masks", _write_masks, lambda classes: None),
    "coco-rle": Format(".coco-rle.json", write_rle, lambda classes: require_pycocotools()),
    "coco-polygons": Format(".coco-polygons.json", write_polygons, lambda classes: require_outlines()),
}
