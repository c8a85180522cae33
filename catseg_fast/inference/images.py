"""Reading and validating images: the one place where every input image is checked."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO, Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from catseg_fast.errors import InputError, InputTypeError
from catseg_fast.files import open_regular
from catseg_fast.inference.sources import describe_source, fetch, is_url, local_path
from catseg_fast.inference.transfer import to_device

ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | Tensor
)

# Interpolating a float image in 0..255 may overshoot by rounding.
_ROUNDING = 1e-3
_WARNINGS = Lock()  # the filters are the whole process's, and pictures may be read in threads
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
_TIFF_WIDTH, _TIFF_LENGTH = 256, 257
_CHANNELS = (1, 3, 4)
_EXPECTED = (
    "a path, a URL, a file's content as bytes, a binary file, a PIL image, a numpy array [H, W, 3] or a "
    "torch tensor [3, H, W]"
)


def load_image(image: ImageLike, name: str = "image", device: torch.device | None = None) -> Tensor:
    """Turn any accepted image into a float32 tensor [3, H, W] of RGB values in 0..255.

    Files and PIL images are turned upright by their EXIF orientation and converted to 8-bit RGB from any
    mode (16-bit greys are scaled down, an alpha channel is dropped). Arrays are `[H, W]`, `[H, W, C]` or
    `[C, H, W]`, tensors `[C, H, W]`, with C = 1, 3 or 4 channels, and either may have a leading 1. Both hold
    uint8 or floating values in 0..255; one channel is repeated to three, and the fourth, alpha, is dropped.
    An array that could be read both ways, such as `[3, 5, 3]`, is `[H, W, C]`.

    A string that starts with `http://` or `https://` is fetched, of at most 256 MiB within a minute;
    `file://` names a file. Bytes are a file's content, and a file object is read from its start.

    Args:
        image: what to read.
        name: the argument's name in error messages.
        device: where the values go; 8-bit ones become floats there. By default they stay where they are.

    Raises:
        FileNotFoundError: if the path does not exist.
        InputError: if a file cannot be decoded, or a shape or value is not an image's.
        InputTypeError: if the object or its dtype is not supported.
        RunError: if a URL cannot be fetched.
    """
    if isinstance(image, str) and is_url(image):
        path = local_path(image, name)
        if path is None:
            return _from_array(_read_content(io.BytesIO(fetch(image, name)), repr(image), name), name, device)
        image = path
    if isinstance(image, str | os.PathLike):
        return _from_array(_read(Path(image), name), name, device)
    if isinstance(image, bytes | bytearray | memoryview):
        return _from_array(_read_content(io.BytesIO(image), describe_source(image), name), name, device)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise InputError(f"{name}: the image is empty ({image.width}x{image.height})")
        try:
            array = _decode(image)
        except Exception as error:  # an opened file is decoded only now
            raise InputError(f"{name}: cannot decode the image: {error}") from error
        return _from_array(array, name, device)
    if isinstance(image, np.ndarray):
        return _from_array(image, name, device)
    if isinstance(image, Tensor):
        return _from_tensor(image, name, device)
    if hasattr(image, "read"):
        return _from_array(_read_content(_binary(image, name), describe_source(image), name), name, device)
    raise InputTypeError(f"{name}: expected {_EXPECTED}, got {type(image).__name__}")


def image_size(path: Path, name: str = "image") -> tuple[int, int]:
    """Return the (H, W) that `load_image` gives for a file, from its header; errors as of `load_image`."""
    with _errors_of(path, name), open_regular(path) as file, _open(file) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # some versions of Pillow swap the sides of `size`
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_LENGTH]
        return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def check_upright(path: Path) -> None:
    """Check that a picture is stored as it is to be shown.

    Raises:
        InputError: if its EXIF orientation turns it.
    """
    try:
        with open_regular(path) as file, _open(file) as image:
            orientation = _orientation(image)
    except Exception:  # of a size or a kind that Pillow does not read
        return
    if orientation != 1:
        raise InputError(f"{path}: EXIF orientation {orientation} turns it; store it upright to use tiles")


def _read(path: Path, name: str) -> np.ndarray:
    """Decode a file to an array for `_from_array`."""
    with _errors_of(path, name), open_regular(path) as file, _open(file) as image:
        return _decode(image)


def _read_content(file: BinaryIO, source: str, name: str) -> np.ndarray:
    """Decode an open file to an array for `_from_array`; `source` is what errors call it."""
    try:
        with _open(file) as image:
            return _decode(image)
    except Exception as error:  # damaged files raise errors of many types
        reason = "not a picture in a known format" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{name}: cannot read {source}: {reason}") from error


def _binary(file: Any, name: str) -> BinaryIO:
    """A file object that can be read anywhere; a stream's content is read first."""
    if isinstance(file, io.TextIOBase):
        raise InputTypeError(f"{name}: the file was opened as text; open it with mode 'rb'")
    try:
        if file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek"):
            file.seek(0)
            return file
        content = file.read()
    except (OSError, ValueError) as error:  # it is closed, say
        raise InputError(f"{name}: cannot read {describe_source(file)}: {error}") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise InputTypeError(f"{name}: expected a file of bytes, got one of {type(content).__name__}")
    return io.BytesIO(content)


@contextmanager
def _errors_of(path: Path, name: str) -> Iterator[None]:
    """Give errors of reading a file the argument's name and the path."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file: {str(path)!r}") from None
    except IsADirectoryError:
        raise InputError(f"{name}: {str(path)!r} is a folder, not an image") from None
    except Exception as error:  # damaged files raise errors of many types
        raise InputError(f"{name}: cannot read {str(path)!r}: {error}") from error


def _open(file: BinaryIO) -> Image.Image:
    """Pillow warns from 89 megapixels on, which cameras reach; twice that it still refuses."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _decode(image: Image.Image) -> np.ndarray:
    """An upright copy of a PIL image: uint8 [H, W, 3] or [H, W], or floats [H, W] for mode `F`."""
    image.load()  # reading a TIFF turns it
    if (method := _TURNS.get(_orientation(image))) is not None:
        image = image.transpose(method)
    if image.mode == "F":
        return np.array(image)
    if image.mode.startswith("I"):
        return _eight_bit(np.array(image))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 if there is none, or none that can be read.

    `ImageOps.exif_transpose` also writes all other tags again, and fails for values that it reads but cannot
    write, such as the rational -1/0.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in _TURNS else 1
    except Exception:  # damaged tags raise errors of many types
        return 1


def _eight_bit(grey: np.ndarray) -> np.ndarray:
    """Scale a 16-bit grey [H, W] to uint8; Pillow's mode `I` (int32) holds one too in some formats."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise InputError(f"expected 16-bit grey values, got {low}..{high}")
    return ((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _from_array(array: np.ndarray, name: str, device: torch.device | None) -> Tensor:
    shape = list(array.shape)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[2] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS):
        raise InputError(f"{name}: expected an array [H, W, 3], [3, H, W] or [H, W], got shape {shape}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputTypeError(
            f"{name}: expected an array of uint8 or floating values in 0..255, got {array.dtype}"
        )
    array = np.atleast_3d(array)
    if array.dtype == np.uint8:
        values = torch.from_numpy(np.require(array, requirements=["C", "W"])).permute(2, 0, 1)
        return _from_bytes(values, shape, name, device)
    channels_first = array.transpose(2, 0, 1)[:3]  # without alpha
    with np.errstate(over="ignore"):  # what overflows float32 is refused as infinite
        values = torch.from_numpy(np.array(channels_first, dtype=np.float32, order="C"))
    return _from_floats(values, shape, name, device)


def _from_tensor(tensor: Tensor, name: str, device: torch.device | None) -> Tensor:
    shape = list(tensor.shape)
    if tensor.ndim == 4 and shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 3 or tensor.shape[0] not in _CHANNELS:
        hint = "; use `permute(2, 0, 1)`" if len(shape) == 3 and shape[2] == 3 else ""
        raise InputError(f"{name}: expected a tensor [3, H, W] or [1, H, W], got shape {shape}{hint}")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise InputTypeError(
            f"{name}: expected a tensor of uint8 or floating values in 0..255, got {str(tensor.dtype)[6:]}"
        )
    if tensor.dtype == torch.uint8:
        return _from_bytes(tensor, shape, name, device)
    return _from_floats(tensor[:3].to(torch.float32), shape, name, device)


def _from_bytes(values: Tensor, shape: list[int], name: str, device: torch.device | None) -> Tensor:
    """Return 8-bit values `[C, H, W]` that came as an input of `shape` as RGB in float32."""
    _check_not_empty(values, shape, name)
    if device is not None:
        values = to_device(values, device)
    values = values[:3].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return values.expand(3, -1, -1).contiguous()


def _check_not_empty(values: Tensor, shape: list[int], name: str) -> None:
    if values.numel() == 0:
        raise InputError(f"{name}: the image is empty, got shape {shape}")


def _from_floats(values: Tensor, shape: list[int], name: str, device: torch.device | None) -> Tensor:
    """Check float32 `values` [1 or 3, H, W] that came as an input of `shape`; return them as RGB."""
    _check_not_empty(values, shape, name)
    low, high = (bound.item() for bound in values.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = values.numel() - int(values.isfinite().sum())
        raise InputError(
            f"{name}: {bad} of {values.numel()} values are NaN or infinite in the image of shape {shape}"
        )
    if low < -_ROUNDING or high > 255 + _ROUNDING:
        raise InputError(
            f"{name}: expected values in 0..255, got {low:g}..{high:g} in the image of shape {shape}"
        )
    if 0 < high <= 1:
        only = bool(((values == 0) | (values == 1)).all())
        got = "only the values 0 and 1" if only else f"{low:g}..{high:g}"
        hint = "; if it is nearly black, pass it as uint8" if only else ""
        raise InputError(
            f"{name}: expected values in 0..255, got {got} in the image of shape {shape}, "
            f"which looks like 0..1; multiply by 255{hint}"
        )
    values = values.expand(3, -1, -1).contiguous()
    return values if device is None else to_device(values, device)
