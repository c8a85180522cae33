"""The least that a model must beat on generated scenes: each pixel to the class of the nearest colour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from catseg_fast.data.scenes.dataset import Thing
from catseg_fast.data.scenes.textures import TEXTURES
from catseg_fast.data.scenes.words import COLOURS


class NearestColour:
    """Labels by the nearest of the classes' colours: a thing's from its colour's word, a ground's its mean.

    Of classes of one colour, which it cannot tell apart, the first one is taken.

    Args:
        classes: grounds by name, and compositions.
        blur: standard deviation, in pixels, of what evens out patterns and grain first.
    """

    def __init__(self, classes: tuple[Thing, ...], blur: float = 3.0) -> None:
        self.colours = np.stack([_colour(thing) for thing in classes])
        self.blur = blur

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Labels `[H, W]` of an RGB image `[H, W, 3]`."""
        smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(self.blur)), np.float32)
        colours = self.colours
        distances = (colours**2).sum(1) - 2 * smooth.reshape(-1, 3) @ colours.T
        return distances.argmin(1).reshape(image.shape[:2])


def _colour(thing: Thing) -> NDArray[np.float32]:
    if isinstance(thing, str):
        texture = TEXTURES[thing](np.random.default_rng(0), 192, 192)
        return np.float32(255) * texture.mean(axis=(0, 1), dtype=np.float32)
    return np.asarray(COLOURS[thing.words[1]], np.float32)
