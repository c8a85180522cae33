"""Crops of an image, and the probability map of each class from the crops' logit maps.

Upstream `cat_seg/cat_seg_model.py`: `inference_sliding_window`, and the whole-image path of `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.config import CROP_SIZE, OVERLAP, SLIDING_RESOLUTION
from catseg_fast.errors import InputError


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `[N, C, h, w]` to `size`, bilinear without aligned corners, as everywhere in upstream."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class SlidingWindow:
    """Square crops of a resized image, and the whole image as one more crop.

    Args:
        crop_size: side of a crop in pixels.
        overlap: share of a crop that the next one overlaps, in [0, 1).
        resolution: (height, width) to which the image is resized first, whatever its shape.
    """

    crop_size: int = CROP_SIZE
    overlap: float = OVERLAP
    resolution: tuple[int, int] = SLIDING_RESOLUTION

    def __post_init__(self) -> None:
        if self.crop_size < 1 or self.crop_size > min(self.resolution):
            raise InputError(f"crop_size: {self.crop_size} is not in 1..{min(self.resolution)}")
        if not 0 <= self.overlap < 1 or self.stride < 1:
            raise InputError(f"overlap: {self.overlap} is not in [0, 1), or leaves no stride")

    @property
    def stride(self) -> int:
        """Pixels from one crop to the next."""
        return int(self.crop_size * (1 - self.overlap))

    @property
    def count(self) -> int:
        """Number of crops of an image, including the whole image."""
        return len(self.corners()) + 1

    def corners(self) -> list[tuple[int, int]]:
        """Return the top-left corners of the crops; the last row and column end at the border."""
        rows, columns = (self._starts(size) for size in self.resolution)
        return [(top, left) for top in rows for left in columns]

    def _starts(self, size: int) -> list[int]:
        starts = list(range(0, size - self.crop_size + 1, self.stride))
        rest = size - self.crop_size
        return starts if starts[-1] == rest else [*starts, rest]

    def crops(self, image: Tensor) -> Tensor:
        """Return crops `[N + 1, 3, crop_size, crop_size]` of `image [3, H, W]`, the whole image last."""
        side = self.crop_size
        return self.cut(resize(image[None], self.resolution)[0], resize(image[None], (side, side))[0])

    def cut(self, resized: Tensor, whole: Tensor) -> Tensor:
        """`crops` of an image that was resized to `resolution`, and to a crop's size."""
        side = self.crop_size
        windows = [resized[:, top : top + side, left : left + side] for top, left in self.corners()]
        return torch.stack([*windows, whole])

    def merge(self, logits: Tensor) -> Tensor:
        """Probabilities `[T, *resolution]` from the crops' `logits [N + 1, T, h, w]`.

        The crops' probabilities are averaged where they overlap, then with the whole image's.
        """
        side = self.crop_size
        probabilities = resize(logits, (side, side)).sigmoid()
        *windows, whole = probabilities
        total = probabilities.new_zeros(logits.shape[1], *self.resolution)
        count = probabilities.new_zeros(self.resolution)
        for (top, left), window in zip(self.corners(), windows, strict=True):
            total[:, top : top + side, left : left + side] += window
            count[top : top + side, left : left + side] += 1
        return (total / count + resize(whole[None], self.resolution)[0]) / 2


def pad_to_multiple(image: Tensor, divisor: int) -> Tensor:
    """Zero-pad `[3, H, W]` at the bottom and right to multiples of `divisor`."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % divisor, 0, -height % divisor))
