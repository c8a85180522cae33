"""Decoding of image files: one way for all, with a limit of pixels, and upright rows a few at a time.

Pillow holds 4 bytes per pixel of a decoded RGB image. What is made of it here is made from strips of rows, so
that no second whole copy exists beside it.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from catseg_fast.errors import InputError
from catseg_fast.files import open_image, open_regular

STRIP_PIXELS = 2**21  # that are converted at a time

_PLAIN = 7  # bytes per pixel: Pillow's, and the answer's
_DECODER_BYTES = {"WEBP": 15, "JPEG2000": 15, "AVIF": 10}  # measured with Pillow 12.3

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # from the orientation as it is stored
_SIDEWAYS = (5, 6, 7, 8)
_FROM_THE_END = (3, 4, 7, 8)  # upright rows run against the stored rows or columns
_TIFF_WIDTH, _TIFF_LENGTH = 256, 257
_HALF, _QUARTER = 1, 2  # colours per pixel, as `get_sampling` tells


@contextmanager
def opened(path: Path, name: str, max_pixels: int | None) -> Iterator[Image.Image]:
    """Yield an image file, opened but not decoded.

    Args:
        path: of the file.
        name: the argument's name in error messages.
        max_pixels: most pixels that may be decoded; None for no limit.

    Raises:
        FileNotFoundError: if the path does not exist.
        InputError: if the image has more than `max_pixels`, or cannot be read or decoded, also within the
            `with` block.
    """
    try:
        with open_regular(path) as file, open_image(file) as image:
            check_header(image, max_pixels, f"{name}: {str(path)!r}")
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file: {str(path)!r}") from None
    except IsADirectoryError:
        raise InputError(f"{name}: {str(path)!r} is a folder, not an image") from None
    except Exception as error:  # damaged files raise whatever the format's decoder stumbles over
        if names(error, name):
            raise
        raise InputError(f"{name}: cannot read {str(path)!r}: {_reason(error)}") from error


@contextmanager
def opened_content(file: BinaryIO, source: str, name: str, max_pixels: int | None) -> Iterator[Image.Image]:
    """Do as `opened` with an open file; `source` is what errors call it."""
    try:
        with open_image(file) as image:
            check_header(image, max_pixels, f"{name}: {source}")
            yield image
    except Exception as error:  # damaged files raise whatever the format's decoder stumbles over
        if names(error, name):
            raise
        raise InputError(f"{name}: cannot read {source}: {_reason(error)}") from error


def _reason(error: Exception) -> object:
    return "not a picture in a known format" if isinstance(error, UnidentifiedImageError) else error


def names(error: Exception, name: str) -> bool:
    """Check whether an error already says which argument it is about."""
    return isinstance(error, InputError) and str(error).startswith(f"{name}: ")


def check_header(image: Image.Image, max_pixels: int | None, name: str) -> None:
    """Check an image that is opened and not decoded; errors as of `check_pixels`."""
    check_pixels(image.size, max_pixels, name, *_weight(image))


def check_pixels(
    size: tuple[int, int], max_pixels: int | None, name: str, weight: float = 1, kind: str = ""
) -> None:
    """Check an image's (width, height) against a limit.

    Args:
        size: of the image.
        max_pixels: the limit; None for none.
        name: what errors call the image.
        weight: memory that decoding a pixel takes, in that of most formats.
        kind: name of the format, if that is not 1.

    Raises:
        InputError: if it has more than `max_pixels` pixels, or takes the memory of more.
    """
    width, height = size
    count = math.ceil(width * height * weight)
    if max_pixels is None or count <= max_pixels:
        return
    text = f"{name} has {width}x{height} = {width * height:,} pixels"
    if weight != 1:
        text += f" in {kind}, which takes the memory of {count:,} to decode"
    raise InputError(f"{text}; the limit is {max_pixels:,} (max_pixels), which protects the memory")


def _weight(image: Image.Image) -> tuple[float, str]:
    """The memory of decoding a pixel, in the `_PLAIN` bytes of most formats, and the format's name."""
    if image.mode == "F":
        return 20 / _PLAIN, "floats"
    if isinstance(image, JpegImageFile) and image.info.get("progressive"):
        # All coefficients, 2 bytes each, are held beside the pixels until the end of the file.
        bands = len(image.getbands())
        coefficients = {_HALF: 4, _QUARTER: 3}.get(get_sampling(image), 2 * bands)
        pixels = 1 if bands == 1 else 4
        return max(1, (coefficients + pixels) / _PLAIN), "progressive JPEG"
    return _DECODER_BYTES.get(image.format or "", _PLAIN) / _PLAIN, str(image.format)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """The (H, W) of an image that is turned upright, from its header."""
    width, height = image.size
    if isinstance(image, TiffImageFile):  # some versions of Pillow swap the sides of `size`
        width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_LENGTH]
    return (width, height) if orientation_of(image) in _SIDEWAYS else (height, width)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 if there is none, or none that can be read.

    `ImageOps.exif_transpose` also writes all other tags again, and fails for values that it reads but cannot
    write, such as the rational -1/0.
    """
    try:
        if isinstance(image, PngImageFile) and image.tile and not _has_late_text(image):
            exif = Image.Image.getexif(image)  # the class's own method decodes the image first
        else:
            exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in _TURNS else 1
    except Exception:  # damaged tags raise whatever the reader stumbles over
        return 1


def _has_late_text(image: PngImageFile) -> bool:
    """Check whether a PNG that is not decoded has EXIF or text behind its pixels."""
    file = image.fp
    assert file is not None
    position = file.tell()
    try:
        file.seek(8)  # behind the signature
        pixels = False
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)  # with the checksum
        return False
    finally:
        file.seek(position)


class Upright:
    """The rows of an image that is turned upright: 8-bit RGB, or the floats of mode `F`.

    Attributes:
        height, width: of the upright image.
        floating: whether the rows are floats.
    """

    def __init__(self, image: Image.Image) -> None:
        image.load()  # reading a TIFF turns it
        self._image, self._orientation = image, orientation_of(image)
        self._sideways = self._orientation in _SIDEWAYS
        self.width, self.height = image.size[::-1] if self._sideways else image.size
        self.floating = image.mode == "F"

    def strips(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield all rows, from the top, a few at a time, and which ones they are; arrays as of `rows`."""
        step = max(1, STRIP_PIXELS // self.width)
        for start in range(0, self.height, step):
            rows = slice(start, min(start + step, self.height))
            yield rows, self.rows(rows)

    def rows(self, rows: slice) -> np.ndarray:
        """Rows as uint8 `[h, W, 3]` or, of a grey image of 16 bits, `[h, W]`; or as floats `[h, W]`."""
        start, stop = rows.start, rows.stop
        if self._orientation in _FROM_THE_END:
            start, stop = self.height - stop, self.height - start
        box = (start, 0, stop, self.width) if self._sideways else (0, start, self.width, stop)
        part = self._image.crop(box)
        if (method := _TURNS.get(self._orientation)) is not None:
            part = part.transpose(method)
        if part.mode == "F":
            return np.array(part)
        if part.mode.startswith("I"):
            return _eight_bit(np.array(part))
        if part.mode == "P" and "transparency" in self._image.info:
            part = part.convert("RGBA")
        return np.array(part.convert("RGB"))


def _eight_bit(grey: np.ndarray) -> np.ndarray:
    """Scale a 16-bit grey [H, W] to uint8; Pillow's mode `I` (int32) holds one too in some formats."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise InputError(f"expected 16-bit grey values, got {low}..{high}")
    return ((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
