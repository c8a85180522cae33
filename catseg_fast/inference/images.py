"""Reading and validating images: the one place where every input image is checked."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from catseg_fast.config import MAX_PIXELS
from catseg_fast.errors import InputError, InputTypeError
from catseg_fast.inference.decoding import (
    Upright,
    check_header,
    check_pixels,
    names,
    opened,
    opened_content,
    orientation_of,
    upright_size,
)
from catseg_fast.inference.sources import describe_source, fetch, is_url, local_path
from catseg_fast.inference.transfer import to_device
from catseg_fast.numeric import whole
from catseg_fast.output.strips import row_strips

ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | Tensor
)

# Interpolating a float image in 0..255 may overshoot by rounding.
_ROUNDING = 1e-3
_CHANNELS = (1, 3, 4)
_EXPECTED = (
    "a path, a URL, a file's content as bytes, a binary file, a PIL image, a numpy array [H, W, 3] or a "
    "torch tensor [3, H, W]"
)


def load_image(
    image: ImageLike,
    name: str = "image",
    max_pixels: int | None = MAX_PIXELS,
    device: torch.device | None = None,
) -> Tensor:
    """Turn any accepted image into a float32 tensor [3, H, W] of RGB values in 0..255.

    Files and PIL images are turned upright by their EXIF orientation and converted to 8-bit RGB from any
    mode (16-bit greys are scaled down, an alpha channel is dropped). Arrays are `[H, W]`, `[H, W, C]` or
    `[C, H, W]`, tensors `[C, H, W]`, with C = 1, 3 or 4 channels, and either may have a leading 1. Both hold
    uint8 or floating values in 0..255; one channel is repeated to three, and the fourth, alpha, is dropped.
    An array that could be read both ways, such as `[3, 5, 3]`, is `[H, W, C]`. A tensor stays on its device.

    A string that starts with `http://` or `https://` is fetched, of at most 256 MiB within a minute;
    `file://` names a file. Bytes are a file's content, and a file object is read from its start.

    Args:
        image: what to read.
        name: the argument's name in error messages.
        max_pixels: most pixels of a file or PIL image, looked up before it is decoded; None for no limit.
        device: where the values go; 8-bit ones become floats there. By default they stay where they are.

    Raises:
        FileNotFoundError: if the path does not exist.
        InputError: if a file cannot be decoded or has too many pixels, or a shape or value is not an image's.
        InputTypeError: if the object or its dtype is not supported.
        RunError: if a URL cannot be fetched.
    """
    return as_floats(load_pixels(image, name, max_pixels), device)


def as_floats(pixels: Tensor, device: torch.device | None = None) -> Tensor:
    """Return what `load_pixels` gives as contiguous float32, on a device; bytes go there as they are."""
    if device is not None:
        pixels = to_device(pixels, device)
    if pixels.dtype == torch.float32:
        return pixels
    return pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def load_pixels(image: ImageLike, name: str = "image", max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """Do as `load_image`, but keep 8-bit values as uint8, a quarter of the memory.

    Pixels that come as bytes are not copied, and need not be contiguous.
    """
    check_max_pixels(max_pixels)
    if isinstance(image, str) and is_url(image):
        path = local_path(image, name)
        if path is None:
            return _from_content(io.BytesIO(fetch(image, name)), repr(image), name, max_pixels)
        image = path
    if isinstance(image, str | os.PathLike):
        with opened(Path(image), name, max_pixels) as file:
            return _from_picture(file, f"{name}: {str(image)!r}")
    if isinstance(image, bytes | bytearray | memoryview):
        return _from_content(io.BytesIO(image), describe_source(image), name, max_pixels)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise InputError(f"{name}: the image is empty ({image.width}x{image.height})")
        if getattr(image, "tile", None):  # it has not been decoded
            check_header(image, max_pixels, f"{name}: the image")
        else:
            check_pixels(image.size, max_pixels, f"{name}: the image")
        try:
            return _from_picture(image, name)
        except Exception as error:  # an opened file is decoded only now
            if names(error, name):
                raise
            raise InputError(f"{name}: cannot decode the image: {error}") from error
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, Tensor):
        return _from_tensor(image, name)
    if hasattr(image, "read"):
        return _from_content(_binary(image, name), describe_source(image), name, max_pixels)
    raise InputTypeError(f"{name}: expected {_EXPECTED}, got {type(image).__name__}")


def load_bytes(image: ImageLike, name: str = "image", max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """Do as `load_image`, rounded to uint8."""
    pixels = load_pixels(image, name, max_pixels)
    if pixels.dtype == torch.uint8:
        return pixels
    rounded = torch.empty(pixels.shape, dtype=torch.uint8, device=pixels.device)
    for rows in row_strips(*pixels.shape[1:]):
        rounded[:, rows] = pixels[:, rows].round()
    return rounded


def image_size(path: Path, name: str = "image", max_pixels: int | None = MAX_PIXELS) -> tuple[int, int]:
    """Return the (H, W) that `load_image` gives for a file, from its header; errors as of `load_image`."""
    with opened(path, name, max_pixels) as image:
        return upright_size(image)


def check_upright(path: Path) -> None:
    """Check that a picture is stored as it is to be shown.

    Raises:
        InputError: if its EXIF orientation turns it.
    """
    try:
        with opened(path, "image", None) as image:
            orientation = orientation_of(image)
    except Exception:  # of a size or a kind that Pillow does not read
        return
    if orientation != 1:
        raise InputError(f"{path}: EXIF orientation {orientation} turns it; store it upright to use tiles")


def check_max_pixels(max_pixels: int | None) -> int | None:
    """Return a limit of pixels, or None for no limit.

    Raises:
        InputError, InputTypeError: if it is not a positive number.
    """
    return None if max_pixels is None else whole(max_pixels, "max_pixels")


def _from_picture(image: Image.Image, name: str) -> Tensor:
    """Decode an opened image."""
    picture = Upright(image)
    channels, dtype = (1, torch.float32) if picture.floating else (3, torch.uint8)
    pixels = torch.empty(channels, picture.height, picture.width, dtype=dtype)
    for rows, strip in picture.strips():
        values = torch.from_numpy(strip)
        pixels[:, rows] = values.permute(2, 0, 1) if values.ndim == 3 else values
    if not picture.floating:
        return pixels
    return _validated(pixels, [picture.height, picture.width], name)


def _from_content(file: BinaryIO, source: str, name: str, max_pixels: int | None) -> Tensor:
    """Decode an open file; `source` is what errors call it."""
    with opened_content(file, source, name, max_pixels) as image:
        return _from_picture(image, f"{name}: {source}")


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


def _from_array(array: np.ndarray, name: str) -> Tensor:
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
    channels_first = np.atleast_3d(array).transpose(2, 0, 1)[:3]  # without alpha
    if array.dtype == np.uint8:
        values = torch.from_numpy(np.require(np.atleast_3d(array), requirements=["C", "W"]))
        return _rgb(values.permute(2, 0, 1)[:3], shape, name)
    with np.errstate(over="ignore"):  # what overflows float32 is refused as infinite
        values = torch.from_numpy(np.array(channels_first, dtype=np.float32, order="C"))
    return _validated(values, shape, name)


def _from_tensor(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
        kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else str(tensor.layout)
        raise InputTypeError(f"{name}: expected a dense tensor with values, got a {kind} one")
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
        return _rgb(tensor[:3], shape, name)
    return _validated(tensor[:3].to(torch.float32), shape, name)


def _validated(values: Tensor, shape: list[int], name: str) -> Tensor:
    """Check float32 `values` [1 or 3, H, W] that came as an input of `shape`; return them as RGB."""
    rgb = _rgb(values, shape, name).contiguous()
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
    return rgb


def _rgb(values: Tensor, shape: list[int], name: str) -> Tensor:
    """Return `values` [1 or 3, H, W] that came as an input of `shape` as [3, H, W]."""
    if values.numel() == 0:
        raise InputError(f"{name}: the image is empty, got shape {shape}")
    return values.expand(3, -1, -1)
