"""A labelled data set in a folder: pictures, index maps of the same names, and a list of classes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from catseg_fast.config import MAX_PIXELS
from catseg_fast.data.class_list import read_class_list
from catseg_fast.errors import InputError
from catseg_fast.files import open_image, open_regular
from catseg_fast.identity import content_digest
from catseg_fast.inference.decoding import check_header, names, orientation_of
from catseg_fast.inference.images import check_max_pixels, image_size, load_bytes

READERS = 4  # threads that read files for the fingerprint
# Tags of TIFF and their values.
_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC = 258, 259, 262
_BLACK_IS_ZERO, _PALETTE = 1, 3
_LOSSLESS = (
    1,
    2,
    3,
    4,
    5,
    8,
    32773,
    32946,
    34925,
    50000,
)  # none, CCITT, LZW, Deflate, PackBits, LZMA, Zstd


class FolderDataset:
    """Pictures and their labels, for training and evaluation; loader workers can be handed it.

    In `root` lie

    - `images/NAME.*`: pictures, in any format that `load_image` reads;
    - `annotations/NAME.png`: each pixel's class index, as an 8- or 16-bit grey PNG, or as one with a palette,
      whose colours do not matter;
    - `classes.json`: the class names, a list of strings; or, for evaluation, an object with the names of each
      class, which compete separately and count as the class.

    A pixel where no class is right holds its PNG's largest value, 255 or 65535. With more than 255 classes,
    255 is a class's index, and only a 16-bit PNG can leave pixels out.

    Args:
        root: the folder.
        max_pixels: most pixels of a picture, looked up before it is decoded; None for no limit.

    Attributes:
        classes: the class names.
        fold: the names of each class, where `classes.json` has several of them.
        ignore_label: what stands for "no class is right" in "sem_seg": 255 for up to 255 classes, else 65535.
        names: the pictures' names without suffix, sorted.

    Raises:
        FileNotFoundError: if a folder or `classes.json` is missing.
        InputError: if a picture has no annotation or an annotation no picture, two pictures share a name,
            there are none, or `classes.json` is not a list of 1 to 65535 names.
    """

    def __init__(self, root: str | os.PathLike[str], max_pixels: int | None = MAX_PIXELS) -> None:
        self.root, self.max_pixels = Path(root), check_max_pixels(max_pixels)
        self.classes, self.fold = read_class_list(self.root)
        self.ignore_label = ignore_label_of(len(self.classes))
        images, annotations = files_by_name(self.root / "images"), files_by_name(self.root / "annotations")
        for name, path in annotations.items():
            if path.suffix.lower() != ".png":
                raise InputError(f"{path}: expected an annotation as PNG")
            if name not in images:
                raise InputError(f"{path}: annotation without image: no {self.root / 'images' / name}.*")
        for name, path in images.items():
            if name not in annotations:
                raise InputError(
                    f"{path}: image without annotation: no {self.root / 'annotations' / name}.png"
                )
        self.names = tuple(sorted(images))
        if not self.names:
            raise InputError(f"{self.root / 'images'}: no images{_unsearched(self.root / 'images')}")
        self._images = tuple(str(images[name]) for name in self.names)
        self._annotations = tuple(str(annotations[name]) for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Entry `index`: "image" uint8 `[3, H, W]`, RGB; "sem_seg" int64 `[H, W]`; "name".

        Raises:
            IndexError: if there is no such entry.
            InputError: if a file cannot be read, an annotation is not an index map, its size is not the
                picture's, or it holds an index that is neither a class's nor the one to ignore.
        """
        name, image_path, path = self.names[index], self._images[index], self._annotations[index]
        image = load_bytes(image_path, max_pixels=self.max_pixels)
        labels = read_annotation(Path(path), len(self.classes), self.max_pixels)
        if labels.shape != image.shape[1:]:
            sizes = [f"{size[1]}x{size[0]}" for size in (labels.shape, image.shape[1:])]
            raise InputError(f"{path}: the annotation is {sizes[0]}, its image {image_path} is {sizes[1]}")
        return {"image": image, "sem_seg": labels, "name": name}

    def pixels(self, index: int) -> int:
        """The pixels of an entry's image by its header; 0 for an image that cannot be read."""
        try:
            height, width = image_size(Path(self._images[index]), max_pixels=self.max_pixels)
        except (OSError, ValueError):
            return 0
        return height * width

    def fingerprint(self) -> str:
        """A hash of the classes, and of the names and contents of all files, each of which is read."""
        with ThreadPoolExecutor(READERS) as readers:
            contents = list(readers.map(content_digest, (*self._images, *self._annotations)))
        facts: list[Any] = [self.classes, self.names, contents]
        if self.fold is not None:
            facts.append(asdict(self.fold))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def ignore_label_of(classes: int) -> int:
    """Return the label for "no class is right" in a data set of `classes` classes."""
    return 255 if classes <= 255 else 65535


def read_annotation(path: Path, classes: int, max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """The class indices int64 `[H, W]` of an 8- or 16-bit PNG, as `FolderDataset` tells.

    Raises:
        InputError: if the file cannot be read, has more than `max_pixels`, is not an index map, or holds an
            index beyond `classes` classes.
    """
    array = read_index_map(path, max_pixels)
    largest = np.iinfo(array.dtype).max
    ignore_label = ignore_label_of(classes)
    labels = array.astype(np.int64)
    if classes <= largest:
        labels[array == largest] = ignore_label
    wrong = (labels >= classes) & (labels != ignore_label)
    if wrong.any():
        raise InputError(
            f"{path}: the annotation has index {labels[wrong].max()} in {wrong.sum()} pixels, "
            f"but the class list has {classes} classes, 0..{classes - 1}"
        )
    return torch.from_numpy(labels)


def read_index_map(path: Path, max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
    """The values of a grey image, or the indices of one with a palette: uint8 or uint16 `[H, W]`.

    Raises:
        InputError: if the file cannot be read, has more than `max_pixels`, or is not a PNG or TIFF whose
            pixels are class indices of 8 or 16 bits: it is in a lossy format, has colours or several pages,
            or its values are stretched or inverted when it is read.
    """
    try:
        with open_regular(path) as file, open_image(file) as image:
            check_header(image, max_pixels, f"{path}: the annotation")
            problem = _why_no_index_map(image)
            array = None if problem else np.array(image)
    except Exception as error:  # damaged files raise errors of many types
        if names(error, str(path)):
            raise
        raise InputError(f"{path}: cannot read the annotation: {error}") from error
    if array is None:
        raise InputError(f"{path}: expected class indices of 8 or 16 bits, got {problem}")
    if array.dtype == np.uint8:
        return array
    if array.min() < 0 or array.max() > 65535:
        raise InputError(f"{path}: expected indices of 16 bits, got {array.min()}..{array.max()}")
    return array.astype(np.uint16)


def _why_no_index_map(image: Image) -> str | None:
    """Return why the pixels of an opened image are not class indices; None if they are."""
    if image.format not in ("PNG", "TIFF"):
        return f"a {image.format} file; label maps are PNG or TIFF, as other formats can change values"
    if getattr(image, "n_frames", 1) > 1:
        return f"a file of {getattr(image, 'n_frames', 1)} images"
    # Pillow stretches grey values of 1, 2 and 4 bits over 0..255.
    stretched = isinstance(image, PngImageFile) and image.mode == "L" and image.tile[0].args != "L"
    if stretched or image.mode == "1":
        return "an image grey of fewer than 8 bits"
    if image.mode not in ("L", "P", "I;16", "I;16B", "I"):
        return f"an image of mode {image.mode}"
    if (orientation := orientation_of(image)) != 1:
        return f"an image that EXIF orientation {orientation} turns; store it upright"
    return _why_no_index_tiff(image) if isinstance(image, TiffImageFile) else None


def _why_no_index_tiff(image: TiffImageFile) -> str | None:
    compression = image.tag_v2.get(_COMPRESSION, 1)
    if compression not in _LOSSLESS:
        return f"a TIFF of compression {compression}, which is not known to be lossless"
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))[0]
    if bits not in (8, 16):
        return f"a TIFF of {bits} bits per pixel"
    photometric = image.tag_v2.get(_PHOTOMETRIC)
    if photometric not in (_BLACK_IS_ZERO, _PALETTE):
        kind = "WhiteIsZero, whose values are inverted" if photometric == 0 else photometric
        return f"a TIFF of photometric interpretation {kind}"
    return None


def _unsearched(folder: Path) -> str:
    """A remark on the folders in `folder`, if there are any."""
    count = sum(path.is_dir() for path in folder.iterdir() if path.name[0] != ".")
    if not count:
        return ""
    return f" ({count} folders in it are not searched; `catseg-fast dataset` searches them)"


def files_by_name(folder: Path) -> dict[str, Path]:
    """A folder's files, hidden ones apart, by their names without suffix, in their order.

    Raises:
        FileNotFoundError: if there is no such folder.
        InputError: if two files have one name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.stem in files:
            raise InputError(f"{files[path.stem]} and {path}: two files of one name")
        files[path.stem] = path
    return files
