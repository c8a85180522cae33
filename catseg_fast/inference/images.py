"""Reading and validating images: the one place where every input image is checked."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from catseg_fast.config import MAX_PIXELS
from catseg_fast.errors import InputError, InputTypeError
from catseg_fast.inference.decoding import Upright, check_pixels, opened, upright_size

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor

# Interpolating a float image in 0..255 may overshoot by rounding alone.
_ROUNDING = 1e-3
# Pillow only recognises the first five; EPS it hands to Ghostscript.
_NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
_EXPECTED = (
    "a path, a file's content as bytes, a PIL image, a numpy array [H, W, 3] or a torch tensor [3, H, W]"
)


def load_image(image: ImageLike, name: str = "image", max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """Turn any accepted image into a float32 tensor [3, H, W] of RGB values in 0..255.

    Files and PIL images are turned upright by their EXIF orientation and converted to 8-bit RGB from any
    mode (16-bit greys are scaled down, an alpha channel is dropped). Arrays are `[H, W, 3]`, `[H, W, 1]` or
    `[H, W]`, tensors `[3, H, W]` or `[1, H, W]`; both hold uint8 or floating values in 0..255, and one
    channel is repeated to three. A tensor stays on its device.

    Args:
        image: what to read.
        name: the argument's name in error messages.
        max_pixels: most pixels of a file or PIL image, looked up before it is decoded; None for no limit.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if a file cannot be decoded or has too many pixels, or a shape or value is not an image's.
        TypeError: if the object or its dtype is not supported.
    """
    return load_pixels(image, name, max_pixels).to(torch.float32)


def load_pixels(image: ImageLike, name: str = "image", max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """`load_image`, but what holds 8 bits stays uint8, a quarter of the memory."""
    check_max_pixels(max_pixels)
    if isinstance(image, bytes | str | os.PathLike):
        with opened(image if isinstance(image, bytes) else Path(image), name, max_pixels) as file:
            return _from_picture(file, name if isinstance(image, bytes) else f"{name}: {str(image)!r}")
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"{name}: the image is empty ({image.width}x{image.height})")
        check_pixels(image.size, max_pixels, f"{name}: the image")
        try:
            return _from_picture(image, name)
        except InputError:
            raise
        except Exception as error:  # an opened file is decoded only now
            raise ValueError(f"{name}: cannot decode the image: {error}") from error
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, Tensor):
        return _from_tensor(image, name)
    raise InputTypeError(f"{name}: expected {_EXPECTED}, got {type(image).__name__}")


def load_bytes(image: ImageLike, name: str = "image", max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """`load_image`, rounded to uint8."""
    pixels = load_pixels(image, name, max_pixels)
    return pixels if pixels.dtype == torch.uint8 else pixels.round().byte()


def image_size(path: Path, name: str = "image", max_pixels: int | None = MAX_PIXELS) -> tuple[int, int]:
    """Return the (H, W) that `load_image` gives for a file, from its header; errors as of `load_image`."""
    with opened(path, name, max_pixels) as image:
        return upright_size(image)


def check_max_pixels(max_pixels: int | None) -> int | None:
    """Return a limit of pixels.

    Raises:
        InputError: if it is not positive.
    """
    if max_pixels is not None and max_pixels <= 0:
        raise InputError(f"max_pixels: {max_pixels} is not positive; None is no limit")
    return max_pixels


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the formats that Pillow decodes."""
    extensions = Image.registered_extensions()
    return frozenset(
        suffix for suffix, kind in extensions.items() if kind in Image.OPEN and kind not in _NOT_DECODED
    )


def _from_picture(image: Image.Image, name: str) -> Tensor:
    """Decode an opened image."""
    picture = Upright(image)
    dtype = torch.float32 if picture.floating else torch.uint8
    pixels = torch.empty(3, picture.height, picture.width, dtype=dtype)
    for rows, strip in picture.strips():
        values = torch.from_numpy(strip)
        pixels[:, rows] = values.permute(2, 0, 1) if values.ndim == 3 else values
    if not picture.floating:
        return pixels
    return _validated(pixels[:1], [picture.height, picture.width], name)


def _from_array(array: np.ndarray, name: str) -> Tensor:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise ValueError(f"{name}: expected an array [H, W, 3] or [H, W], got shape {list(array.shape)}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputTypeError(
            f"{name}: expected an array of uint8 or floating values in 0..255, got {array.dtype}"
        )
    shape, channels_first = list(array.shape), np.atleast_3d(array).transpose(2, 0, 1)
    if array.dtype == np.uint8:
        return _rgb(torch.from_numpy(np.array(channels_first, order="C")), shape, name)
    with np.errstate(over="ignore"):  # what overflows float32 is refused as infinite
        values = torch.from_numpy(np.array(channels_first, dtype=np.float32, order="C"))
    return _validated(values, shape, name)


def _from_tensor(tensor: Tensor, name: str) -> Tensor:
    shape = list(tensor.shape)
    if len(shape) != 3 or shape[0] not in (1, 3):
        hint = "; use `permute(2, 0, 1)`" if len(shape) == 3 and shape[2] == 3 else ""
        raise ValueError(f"{name}: expected a tensor [3, H, W] or [1, H, W], got shape {shape}{hint}")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise InputTypeError(
            f"{name}: expected a tensor of uint8 or floating values in 0..255, got {str(tensor.dtype)[6:]}"
        )
    if tensor.dtype == torch.uint8:
        return _rgb(tensor, shape, name)
    return _validated(tensor.to(torch.float32), shape, name)


def _validated(values: Tensor, shape: list[int], name: str) -> Tensor:
    """Check float32 `values` [1 or 3, H, W] that came as an input of `shape`; return them as RGB."""
    rgb = _rgb(values, shape, name)
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
    return values.expand(3, -1, -1).contiguous()
