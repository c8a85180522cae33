"""One generated scene: grounds, things that overlap on them, light, blur and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from catseg_fast.data.scenes.shapes import DISTANCES, pattern
from catseg_fast.data.scenes.textures import TEXTURES, Image32, Random, noise
from catseg_fast.data.scenes.words import COLOURS, GROUNDS, Composition
from catseg_fast.errors import InputError

Box = tuple[slice, slice]
LEAST_SHARE = 0.4  # share of a thing that must stay visible
SHADOW = 20  # pixels around a thing that its shadow may reach


@dataclass(frozen=True)
class Scene:
    """A picture and its labels.

    Attributes:
        image: RGB, uint8 `[H, W, 3]`.
        labels: index of each pixel into `things`, uint16 `[H, W]`.
        things: names of grounds, compositions of things.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint16]
    things: tuple[str | Composition, ...]


def draw_scene(
    random: Random,
    things: Sequence[Composition],
    grounds: Sequence[str] = GROUNDS,
    size: tuple[int, int] = (384, 384),
) -> Scene:
    """Draw a random scene.

    Args:
        random: source of all random decisions.
        things: compositions to choose from; there are 3 to 6 in a scene, fewer if there is no room.
        grounds: grounds to choose from; there are one or two above each other.
        size: (H, W) in pixels, at least 96 each.

    Raises:
        InputError: if there is nothing to choose from, or the scene is too small.
    """
    if not things or not grounds:
        raise InputError("things, grounds: a scene needs at least one of each to choose from")
    if min(size) < 96:
        raise InputError(f"size: {size[0]}x{size[1]} is below 96x96")
    picture, labels, found = _ground(random, grounds, size)
    names: list[str | Composition] = list(found)
    owners = np.full(size, -1)
    areas: list[int] = []
    shown: list[int] = []  # visible pixels of each thing
    for _ in range(int(random.integers(3, 7))):
        thing = things[int(random.integers(len(things)))]
        box, cover = _place(random, thing.words[2], random.uniform(0.10, 0.24) * min(size), size)
        mask = cover > 0.5
        under = owners[box]
        hidden = np.bincount(under[mask & (under >= 0)], minlength=len(shown))
        if any(n - lost < LEAST_SHARE * area for n, lost, area in zip(shown, hidden, areas, strict=True)):
            continue
        _shade(random, picture[box], cover)
        picture[box] += (_paint(random, thing, cover.shape) - picture[box]) * cover[..., None]
        shown = [n - int(lost) for n, lost in zip(shown, hidden, strict=True)]
        under[mask] = len(shown)
        shown.append(int(mask.sum()))
        areas.append(shown[-1])
        if thing not in names:
            names.append(thing)
        labels[box][mask] = names.index(thing)
    return Scene(_photograph(random, picture), labels, tuple(names))


def _ground(
    random: Random, grounds: Sequence[str], size: tuple[int, int]
) -> tuple[Image32, NDArray[np.uint16], tuple[str, ...]]:
    """Draw one ground, or two with a wavy border between them."""
    count = min(len(grounds), int(random.integers(1, 3)))
    chosen = tuple(grounds[i] for i in random.choice(len(grounds), count, replace=False))
    layers = [TEXTURES[name](random, *size) for name in chosen]
    labels = np.zeros(size, np.uint16)
    if count == 2:
        border = size[0] * random.uniform(0.3, 0.7) + 0.03 * size[0] * noise(random, *size, (1.0, 3.0))
        labels[np.arange(size[0])[:, None] > border] = 1
    picture = layers[0] if count == 1 else np.where(labels[..., None] == 1, layers[1], layers[0])
    return picture.astype(np.float32), labels, chosen


def _place(random: Random, shape: str, radius: float, size: tuple[int, int]) -> tuple[Box, Image32]:
    """Place a shape in the picture; return the box around it and its shadow, and its cover of each pixel."""
    centre = [random.uniform(0.6 * radius, n - 0.6 * radius) for n in size]
    reach = 1.3 * radius + SHADOW
    down, across = (slice(max(0, int(c - reach)), int(c + reach)) for c in centre)
    angle, stretch = random.uniform(-0.35, 0.35), random.uniform(0.88, 1.14)
    y, x = (
        (np.arange(part.start, min(part.stop, n), dtype=np.float32) - np.float32(c)) / np.float32(radius)
        for part, n, c in zip((down, across), size, centre, strict=True)
    )
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = x[None], y[:, None]
    distance = DISTANCES[shape]((cos * x + sin * y) * np.float32(stretch), cos * y - sin * x)
    return (down, across), np.clip(0.5 - distance * np.float32(radius), 0, 1).astype(np.float32)


def _paint(random: Random, thing: Composition, size: tuple[int, ...]) -> Image32:
    """Draw a thing's surface, as if it covered a picture of (H, W)."""
    name, colour, _ = thing.words
    base = np.clip(np.asarray(COLOURS[colour], np.float32) / 255 + random.normal(0, 0.035, 3), 0, 1)
    light = base.mean() < 0.72
    second = base + (1 - base) * random.uniform(0.6, 0.85) if light else base * random.uniform(0.45, 0.65)
    y, x = np.arange(size[0], dtype=np.float32)[:, None], np.arange(size[1], dtype=np.float32)[None]
    angle = random.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    share = pattern(name, cos * x + sin * y, cos * y - sin * x, random.uniform(13, 22))[..., None]
    surface = base * (1 - share) + second * share
    return (surface * (1 + 0.06 * noise(random, size[0], size[1], (3.0, 3.0)))[..., None]).astype(np.float32)


def _shade(random: Random, picture: Image32, cover: Image32) -> None:
    """Darken the shadow of a thing, in place."""
    down, across = (int(x) for x in random.integers(3, 10, 2))
    shadow = np.zeros(cover.shape, np.uint8)
    shadow[down:, across:] = 255 * cover[:-down, :-across]
    blurred = np.asarray(Image.fromarray(shadow).filter(ImageFilter.GaussianBlur(4)), np.float32) / 255
    picture *= (1 - random.uniform(0.2, 0.5) * blurred)[..., None]


def _photograph(random: Random, picture: Image32) -> NDArray[np.uint8]:
    """Return the picture with light from one side, slightly blurred, with noise."""
    height, width, _ = picture.shape
    direction, depth = random.uniform(0, 2 * np.pi), random.uniform(0, 0.25)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    light = random.uniform(0.8, 1.1) + depth * (np.cos(direction) * x + np.sin(direction) * y)
    picture = picture * light[..., None] * random.uniform(0.94, 1.06, 3)
    image = Image.fromarray((255 * np.clip(picture, 0, 1)).astype(np.uint8))
    sharp = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.3)))
    grain = random.standard_normal(picture.shape, dtype=np.float32) * np.float32(random.uniform(0, 8))
    return np.clip(np.asarray(sharp) + grain, 0, 255).astype(np.uint8)
