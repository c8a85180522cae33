"""What a model computes of pictures before it knows the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from catseg_fast.config import CROP_SIZE
from catseg_fast.errors import InputError
from catseg_fast.inference.images import ImageLike
from catseg_fast.inference.readout import Readout
from catseg_fast.reference.inference import pad_to_multiple, resize
from catseg_fast.reference.model import normalise

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg


# Above so many pixels, memory counts for more than the time of a few more calls.
LARGE_PIXELS = 2**24


@dataclass(frozen=True)
class EncodedImage:
    """What the model knows of a picture before it knows the classes; from `CATSeg.encode`.

    Attributes:
        features: dense CLIP features of the picture's B crops, `[B, 1 + h*w, C]`, on the model's device.
        guidance: the three guidance maps `[B, C, H, W]`, from coarse to fine.
        readout: how the crops make up the picture.
        dtype: type of the weights at that time; under autocast the features have another one.
        image: the picture, as a `Segmentation` keeps it.
    """

    features: Tensor
    guidance: tuple[Tensor, ...]
    readout: Readout
    dtype: torch.dtype
    image: ImageLike | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
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
def encode(model: CATSeg, images: Sequence[Tensor], readouts: Sequence[Readout]) -> list[EncodedImage]:
    """Encode images `[3, H, W]`, in one call where their crops are of one size."""
    inputs = [_crops(model, image, readout) for image, readout in zip(images, readouts, strict=True)]
    if len({clip_images.shape[1:] for clip_images, _ in inputs}) > 1:
        pairs = zip(images, readouts, strict=True)
        return [encoded for image, readout in pairs for encoded in encode(model, [image], [readout])]
    clip_images, pixels = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    features, guidance = model.encode_images(clip_images, pixels)
    crops = [len(x) for x, _ in inputs]
    maps = zip(*(x.split(crops) for x in guidance), strict=True)
    parts = zip(features.split(crops), maps, readouts, strict=True)
    return [EncodedImage(*part, dtype=model.dtype) for part in parts]


def _crops(model: CATSeg, image: Tensor, readout: Readout) -> tuple[Tensor, Tensor]:
    """An image's crops `[B, 3, H, W]`, normalised twice, as `CATSeg.encode_images` expects them."""
    if readout.window is not None:
        side = readout.window.crop_size
        resized, whole = _resize(image, readout.window.resolution), _resize(image, (side, side))
        return normalise(readout.window.cut(resized, whole))
    if readout.visible is not None:  # upstream's call
        clip_images, images = normalise(image[None])
        divisor = model.size_divisibility
        return pad_to_multiple(clip_images, divisor), pad_to_multiple(images, divisor)
    side = model.variant.clip.input_size
    clip_images, images = normalise(_resize(image, (side, side))[None])
    if model.backbone is not None and side != CROP_SIZE:
        _, images = normalise(_resize(image, (CROP_SIZE, CROP_SIZE))[None])
    return clip_images, images


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `[3, H, W]` of any real type to float32 `[3, *size]`.

    A large image has no float copy of all its channels: in float32 they take 12 bytes per pixel.
    """
    if image.dtype == torch.float32 or image[0].numel() <= LARGE_PIXELS:
        return resize(image[None].to(torch.float32), size)[0]
    return torch.cat([resize(channel[None, None].to(torch.float32), size)[0] for channel in image])
