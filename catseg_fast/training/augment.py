"""Random crops of a picture and its labels: resized, cropped, recoloured and mirrored as in upstream."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from catseg_fast.data.resize import shortest_edge_size
from catseg_fast.training.recipe import Recipe

MAX_SIDE = 1333  # of the longer side of a resized picture
CROP_ATTEMPTS = 10
PADDING = 128  # grey, where a picture is smaller than the crop

BRIGHTNESS, HUE = 32.0, 0.1  # added, in 0..255 and in turns
LOW, HIGH = 0.5, 1.5  # factors of contrast and saturation


def augment(
    image: Tensor, labels: Tensor, recipe: Recipe, ignore_label: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return a random crop.

    Args:
        image: uint8 `[3, H, W]`.
        labels: `[H, W]`, int64.
        recipe: the recipe of the augmentation.
        ignore_label: label of pixels outside the picture.
        rng: source of all random decisions.

    Returns:
        uint8 `[3, S, S]` and int64 `[S, S]` for the recipe's `crop_size` S.
    """
    side = int(rng.choice(recipe.min_sizes or (recipe.crop_size,)))
    image, labels = _resize_shorter_side(image, labels, side)
    rows, columns = _crop(labels, recipe, ignore_label, rng)
    image, labels = image[:, rows, columns], labels[rows, columns]
    if recipe.colour:
        image = recolour(image, rng)
    if rng.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    below, right = recipe.crop_size - labels.shape[0], recipe.crop_size - labels.shape[1]
    if below or right:
        image = F.pad(image, (0, right, 0, below), value=PADDING)
        labels = F.pad(labels, (0, right, 0, below), value=ignore_label)
    return image.contiguous(), labels.contiguous()


def _resize_shorter_side(image: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    height, width = labels.shape
    size = list(shortest_edge_size(height, width, side, MAX_SIDE))
    if size == [height, width]:
        return image, labels
    image = transforms.resize(image, size, antialias=True)
    labels = transforms.resize(labels[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return image, labels


def _crop(labels: Tensor, recipe: Recipe, ignore_label: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Return the position of a crop where no class's share is too large, or the last one that was tried."""
    limited = recipe.category_max_ratio < 1
    for _ in range(CROP_ATTEMPTS if limited else 1):
        rows, columns = (_interval(length, recipe.crop_size, rng) for length in labels.shape)
        if not limited:
            break
        inside = labels[rows, columns]
        counts = inside[inside != ignore_label].unique(return_counts=True)[1]
        if len(counts) > 1 and counts.max() < recipe.category_max_ratio * counts.sum():
            break
    return rows, columns


def _interval(length: int, size: int, rng: np.random.Generator) -> slice:
    start = int(rng.integers(max(length - size, 0) + 1))
    return slice(start, min(start + size, length))


def recolour(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with a probability of one half, as in SSD."""
    if rng.random() < 0.5:
        image = _affine(image, 1.0, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(LOW, HIGH) if rng.random() < 0.5 else None
    if contrast is not None and contrast_first:
        image = _affine(image, contrast, 0.0)
    if rng.random() < 0.5:
        image = transforms.adjust_saturation(image, rng.uniform(LOW, HIGH))
    if rng.random() < 0.5:
        image = transforms.adjust_hue(image, rng.uniform(-HUE, HUE))
    if contrast is not None and not contrast_first:
        image = _affine(image, contrast, 0.0)
    return image


def _affine(image: Tensor, factor: float, summand: float) -> Tensor:
    return (image.float() * factor + summand).clamp_(0, 255).to(torch.uint8)
