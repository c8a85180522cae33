"""A baseline for generated scenes: each pixel gets the class of the nearest colour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from catseg_fast.data.scenes.dataset import Thing
from catseg_fast.data.scenes.textures import TEXTURES
from catseg_fast.data.scenes.words import COLOURS


class NearestColour:
    """A segmenter by the nearest class colour: that of a thing's colour word, or the mean of a ground.

    Among classes of one colour, it takes the first.

    Args:
        classes: grounds by name, and compositions.
        blur: standard deviation, in pixels, of a blur that first removes patterns and grain.
    """

    def __init__(self, classes: tuple[Thing, ...], blur: float = 3.0) -> None:
        self.colours = np.stack([_colour(thing) for thing in classes])
        self.blur = blur

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the labels `[H, W]` of an RGB image `[H, W, 3]`."""
        smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(self.blur)), np.float32)
        colours = self.colours
        distances = (colours**2).sum(1) - 2 * smooth.reshape(-1, 3) @ colours.T
        return distances.argmin(1).reshape(image.shape[:2])


def _colour(thing: Thing) -> NDArray[np.float32]:
    if isinstance(thing, str):
        texture = TEXTURES[thing](np.random.default_rng(0), 192, 192)
        return np.float32(255) * texture.mean(axis=(0, 1), dtype=np.float32)
    return np.asarray(COLOURS[thing.words[1]], np.float32)
