"""The part of inference that does not depend on the classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from catseg_fast.backend import choose_backend
from catseg_fast.config import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, CROP_SIZE, PIXEL_MEAN, PIXEL_STD
from catseg_fast.engine import precision
from catseg_fast.engine.kept import kept
from catseg_fast.errors import InputError
from catseg_fast.inference.images import ImageLike
from catseg_fast.inference.readout import Readout
from catseg_fast.inference.tower import forget, reduced_clip, replace_type
from catseg_fast.reference.inference import pad_to_multiple, resize
from catseg_fast.reference.model import channels

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg
    from catseg_fast.reference.clip import DenseCLIP


# Above so many pixels, memory counts for more than the time of a few more calls.
LARGE_PIXELS = 2**24


@dataclass(frozen=True)
class EncodedImage:
    """Features of a picture that do not depend on the classes; from `CATSeg.encode`.

    Attributes:
        features: dense CLIP features of the picture's B crops, `[B, 1 + h*w, C]`, on the model's device.
        guidance: the three guidance maps `[B, C, H, W]`, from coarse to fine.
        readout: conversion of the crops' logits to the picture.
        dtype: type of the weights at that time; under autocast the features have another type.
        image: the picture, as kept by a `Segmentation`.
    """

    features: Tensor
    guidance: tuple[Tensor, ...]
    readout: Readout
    dtype: torch.dtype
    image: ImageLike | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(x.nbytes for x in (self.features, *self.guidance))

    def check(self, like: Tensor, sliding_window: bool | None) -> None:
        """Check that it fits a model with the weight `like` and a call with `sliding_window`.

        Raises:
            InputError: if it does not; the message has both.
        """
        if (self.features.device, self.dtype) != (like.device, like.dtype):
            raise InputError(
                f"image: it was encoded on {self.features.device} in {self.dtype}, "
                f"and the model is on {like.device} in {like.dtype}"
            )
        sliding = self.readout.window is not None
        if sliding_window is not None and sliding_window != sliding:
            raise InputError(f"sliding_window: {sliding_window}, and the image was encoded with {sliding}")


@torch.no_grad()
def encode(
    model: CATSeg, images: Sequence[Tensor], readouts: Sequence[Readout], checked: bool = True
) -> list[EncodedImage]:
    """Encode images `[3, H, W]`, in one call where their crops are of one size.

    Args:
        checked: wait for the features, and compute them again in bf16, with a warning, if they overflow fp16.
    """
    inputs = [_crops(image, readout, model) for image, readout in zip(images, readouts, strict=True)]
    if len({clip_images.shape[1:] for clip_images, _ in inputs}) > 1:
        pairs = zip(images, readouts, strict=True)
        return [encoded for image, readout in pairs for encoded in encode(model, [image], [readout], checked)]
    clip_images, pixels = (join(parts) for parts in zip(*inputs, strict=True))
    features, guidance = _encode_crops(model, clip_images, pixels, checked)
    crops = [len(x) for x, _ in inputs]
    maps = zip(*(x.split(crops) for x in guidance), strict=True)
    parts = zip(features.split(crops), maps, readouts, strict=True)
    return [EncodedImage(*part, dtype=model.dtype) for part in parts]


def image_type(model: CATSeg) -> torch.dtype:
    """Return the type of CLIP's image tower in the next call."""
    weight = model.clip_model.visual.proj
    if choose_backend(model.backend, model.device) == "reference":
        return weight.dtype
    return precision.image_dtype(model.engine.precision, weight)


def image_tower(model: CATSeg) -> DenseCLIP:
    """Return CLIP as the next call encodes pictures with it: the model's own, or in 16 bits."""
    clip, dtype = model.clip_model, image_type(model)
    if dtype == clip.visual.proj.dtype:
        forget(clip)
        return clip
    return reduced_clip(clip, dtype)


def _encode_crops(
    model: CATSeg, clip_images: Tensor, pixels: Tensor, checked: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    clip, reduced = model.clip_model, image_tower(model)
    if reduced is clip:
        return model.encode_images(clip_images, pixels)
    features, guidance = model.encode_images(clip_images, pixels, reduced)
    if not checked or reduced.visual.proj.dtype != torch.float16:
        return features, guidance
    if all(x.isfinite().all() for x in (features, *guidance)) or not clip_images.isfinite().all():
        return features, guidance
    warnings.warn("CLIP: fp16 overflowed: computing again in bf16", RuntimeWarning, stacklevel=2)
    model.engine.recordings.clear()
    return model.encode_images(clip_images, pixels, replace_type(clip, torch.float16, torch.bfloat16))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Return crops of several pictures, or of one as they are."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _crops(image: Tensor, readout: Readout, model: CATSeg) -> tuple[Tensor, Tensor]:
    """Return an image's crops `[B, 3, H, W]`, normalised as `CATSeg.encode_images` takes them.

    Only v1's backbone is shown the second ones; without it they are the first ones.
    """
    if image.dtype == torch.uint8:
        return _crops_of_bytes(image, readout, model)
    crops = image[None] if readout.window is None else readout.window.crops(image)
    normalised = [_normalise(crops, CLIP_PIXEL_MEAN, CLIP_PIXEL_STD)]
    if model.backbone is not None:
        normalised.append(_normalise(crops, PIXEL_MEAN, PIXEL_STD))
    if readout.visible is not None:  # upstream's call
        normalised = [pad_to_multiple(x, model.size_divisibility) for x in normalised]
    return normalised[0], normalised[-1]


def _crops_of_bytes(image: Tensor, readout: Readout, model: CATSeg) -> tuple[Tensor, Tensor]:
    """Return `_crops` of a large uint8 image, without a float copy of all its channels.

    They are resized before they are normalised.
    """
    window = readout.window
    if window is not None:
        side = window.crop_size
        crops = other = window.cut(_resize(image, window.resolution), _resize(image, (side, side)))
    else:
        side = model.variant.clip.input_size
        crops = other = _resize(image, (side, side))[None]
        if model.backbone is not None and side != CROP_SIZE:
            other = _resize(image, (CROP_SIZE, CROP_SIZE))[None]
    clip_images = _normalise(crops, CLIP_PIXEL_MEAN, CLIP_PIXEL_STD)
    return clip_images, clip_images if model.backbone is None else _normalise(other, PIXEL_MEAN, PIXEL_STD)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 `[3, H, W]` to float32 `[3, *size]`, a channel at a time."""
    return torch.cat([resize(channel[None, None].to(torch.float32), size)[0] for channel in image])


class _Constants:
    """Owner of cached values that depend only on the configuration."""


_CONSTANTS = _Constants()


def _normalise(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    centre, scale = kept(
        _CONSTANTS,
        (mean, std, crops.device),
        crops.device,
        lambda: (channels(mean, crops), channels(std, crops)),
    )
    return (crops - centre) / scale
