"""Grounds as textures: RGB images in 0..1 from a random generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Image32 = NDArray[np.float32]
Random = np.random.Generator


def noise(random: Random, height: int, width: int, cells: tuple[float, float], octaves: int = 3) -> Image32:
    """Return smooth noise `[height, width]` in about -1..1, with `cells` (down, across) in octave one."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        rows, columns = (max(2, round(n * 2**octave) + 1) for n in cells)
        grid = Image.fromarray(random.standard_normal((rows, columns), dtype=np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return np.tanh(total / 1.3)


def _colour(rgb: tuple[float, ...]) -> Image32:
    return np.asarray(rgb, np.float32)


def _mix(a: tuple[float, ...], b: tuple[float, ...], share: NDArray[np.floating[Any]]) -> Image32:
    """Return colours between `a` (share 0) and `b` (share 1): `[H, W, 3]`."""
    share = np.clip(share, 0, 1)[..., None]
    return _colour(a) * (1 - share) + _colour(b) * share


def _grid(height: int, width: int) -> tuple[Image32, Image32]:
    return np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]


def _hash(random: Random, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Image32:
    """Return a random number in 0..1 for each cell of a grid, by its row and column."""
    table = random.random((int(rows.max()) + 1, int(columns.max()) + 1), dtype=np.float32)
    return table[rows, columns]


def _wood(random: Random, height: int, width: int) -> Image32:
    row, column = _grid(height, width)
    plank, length = random.uniform(26, 46), random.uniform(110, 220)
    rows = (row / plank).astype(np.intp)
    columns = ((column + 67.0 * rows) / length).astype(np.intp)
    tone = 0.35 * _hash(random, rows, columns) + 0.35 * noise(random, height, width, (height / 5, 3.0))
    seam = ((row % plank) < 2) | (((column + 67.0 * rows) % length) < 2)
    return _mix((0.42, 0.26, 0.13), (0.76, 0.55, 0.33), 0.45 + tone) * np.where(seam, 0.55, 1.0)[..., None]


def _bricks(random: Random, height: int, width: int) -> Image32:
    row, column = _grid(height, width)
    brick_h = random.uniform(17, 28)
    brick_w = 2.3 * brick_h
    rows = (row / brick_h).astype(np.intp)
    across = column + brick_w / 2 * (rows % 2)
    tone = 0.6 * _hash(random, rows, (across / brick_w).astype(np.intp))
    tone += 0.2 * noise(random, height, width, (40.0, 40.0))
    wall = _mix((0.45, 0.20, 0.15), (0.70, 0.38, 0.28), 0.2 + tone)
    mortar = ((row % brick_h) < 3) | ((across % brick_w) < 3)
    return np.where(mortar[..., None], _colour((0.72, 0.69, 0.65)), wall)


def _grass(random: Random, height: int, width: int) -> Image32:
    blades = noise(random, height, width, (height / 8, width / 3), 2)
    patches = noise(random, height, width, (3.0, 3.0))
    return _mix((0.12, 0.30, 0.06), (0.46, 0.62, 0.20), 0.45 + 0.4 * blades + 0.2 * patches)


def _sand(random: Random, height: int, width: int) -> Image32:
    row, column = _grid(height, width)
    bend = 14 * noise(random, height, width, (3.0, 3.0))
    ripples = np.sin((row + 0.25 * column + bend) * (2 * np.pi / random.uniform(16, 30)))
    grain = noise(random, height, width, (height / 2, width / 2), 1)
    return _mix((0.72, 0.60, 0.40), (0.93, 0.84, 0.64), 0.5 + 0.25 * ripples + 0.2 * grain)


def _water(random: Random, height: int, width: int) -> Image32:
    row, column = _grid(height, width)
    bend = 12 * noise(random, height, width, (6.0, 3.0))
    waves = np.sin((row + bend) * (2 * np.pi / random.uniform(12, 24)) + 0.02 * column)
    waves = 0.3 * waves + 0.3 * noise(random, height, width, (20.0, 6.0))
    return _mix((0.05, 0.22, 0.34), (0.34, 0.60, 0.68), 0.42 + waves)


def _tiles(random: Random, height: int, width: int) -> Image32:
    row, column = _grid(height, width)
    side = random.uniform(34, 60)
    tone = 0.35 * _hash(random, (row / side).astype(np.intp), (column / side).astype(np.intp))
    floor = _mix(
        (0.60, 0.62, 0.66), (0.86, 0.87, 0.88), 0.3 + tone + 0.15 * noise(random, height, width, (6.0, 6.0))
    )
    joint = ((row % side) < 3) | ((column % side) < 3)
    return np.where(joint[..., None], _colour((0.36, 0.37, 0.40)), floor)


def _sky(random: Random, height: int, width: int) -> Image32:
    row, _ = _grid(height, width)
    clouds = noise(random, height, width, (3.0, 2.5), 5)
    blue = _mix((0.33, 0.56, 0.88), (0.66, 0.81, 0.95), np.broadcast_to(row / height, (height, width)))
    share = np.clip(0.25 + 0.9 * clouds, 0, 1)[..., None]
    return blue * (1 - share) + _colour((0.95, 0.96, 0.97)) * share


def _gravel(random: Random, height: int, width: int) -> Image32:
    stones = noise(random, height, width, (height / 7, width / 7), 2)
    return _mix((0.22, 0.22, 0.23), (0.66, 0.64, 0.62), 0.45 + 0.5 * stones)


TEXTURES: dict[str, Callable[[Random, int, int], Image32]] = {
    "wooden floor": _wood,
    "brick wall": _bricks,
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "tiled floor": _tiles,
    "cloudy sky": _sky,
    "gravel": _gravel,
}
