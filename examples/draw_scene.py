"""Draws the example picture: a street with houses, trees, a car and a person under a cloudy sky.

python examples/draw_scene.py [examples/street.png]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 640, 448
SUPERSAMPLING = 2  # shapes are drawn larger and reduced, which smooths their edges
HORIZON, KERB, ROAD = 262, 318, 334

Colour = tuple[int, int, int]
Point = tuple[float, float]


class Scene:
    """A picture drawn in pixels of the final size, back to front."""

    def __init__(self, seed: int = 7) -> None:
        self.random = np.random.default_rng(seed)
        self.image = Image.new("RGB", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING))

    def polygon(self, points: Sequence[Point], colour: Colour, texture: float = 0.0) -> None:
        mask = self._mask()
        ImageDraw.Draw(mask).polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=255)
        self._paint(mask, colour, texture)

    def box(
        self, x: float, y: float, width: float, height: float, colour: Colour, texture: float = 0.0
    ) -> None:
        self.polygon([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], colour, texture)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour, texture: float = 0.0) -> None:
        mask = self._mask()
        bounds = [value * SUPERSAMPLING for value in (x - rx, y - ry, x + rx, y + ry)]
        ImageDraw.Draw(mask).ellipse(bounds, fill=255)
        self._paint(mask, colour, texture)

    def gradient(self, top: int, bottom: int, upper: Colour, lower: Colour) -> None:
        """Blend two colours from row `top` to row `bottom`."""
        rows = np.linspace(0, 1, (bottom - top) * SUPERSAMPLING)[:, None, None]
        colours = np.array(upper) * (1 - rows) + np.array(lower) * rows
        stripe = np.broadcast_to(colours, (len(rows), self.image.width, 3)).astype(np.uint8)
        self.image.paste(Image.fromarray(np.ascontiguousarray(stripe)), (0, top * SUPERSAMPLING))

    def soft(self, x: float, y: float, rx: float, ry: float, colour: Colour, alpha: int, blur: float) -> None:
        """A blurred, translucent ellipse: a cloud, a shadow."""
        mask = self._mask()
        bounds = [value * SUPERSAMPLING for value in (x - rx, y - ry, x + rx, y + ry)]
        ImageDraw.Draw(mask).ellipse(bounds, fill=alpha)
        self.image.paste(colour, (0, 0), mask.filter(ImageFilter.GaussianBlur(blur * SUPERSAMPLING)))

    def finish(self) -> Image.Image:
        """The picture at its final size, with a little sensor noise, in even values for a small file."""
        pixels = np.asarray(self.image.resize((WIDTH, HEIGHT), Image.Resampling.BOX), dtype=np.float32)
        noise = self.random.normal(0, 0.6, (HEIGHT, WIDTH, 1))
        return Image.fromarray((((pixels + noise) / 2).round() * 2).clip(0, 254).astype(np.uint8))

    def _mask(self) -> Image.Image:
        return Image.new("L", self.image.size)

    def _paint(self, mask: Image.Image, colour: Colour, texture: float) -> None:
        """Fill `mask`; `texture` is the deviation of patches a few pixels wide, in grey levels."""
        box = mask.getbbox()
        if box is None or not texture:
            self.image.paste(colour, (0, 0), mask)
            return
        width, height = box[2] - box[0], box[3] - box[1]
        grain = self.random.normal(0, texture, (height // 6 + 1, width // 6 + 1)).astype(np.float32)
        smooth = np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC))
        pixels = (np.array(colour, dtype=np.float32) + smooth[..., None]).clip(0, 255).astype(np.uint8)
        self.image.paste(Image.fromarray(pixels), box[:2], mask.crop(box))


def draw_scene() -> Image.Image:
    """The example picture, 640x448; the same with every call."""
    scene = Scene()
    _sky(scene)
    _ground(scene)
    _tree(scene, 40, 300, 1.1)
    _house(scene, 92, 150, 168, 152, wall=(196, 160, 128), roof=(128, 58, 48))
    _tree(scene, 292, 304, 1.25)
    _house(scene, 356, 178, 138, 124, wall=(214, 208, 190), roof=(84, 88, 100))
    _tree(scene, 540, 300, 0.95)
    _tree(scene, 604, 306, 1.3)
    _fence(scene, 496, 640)
    _lamp(scene, 330)
    _person(scene, 268, 326)
    _car(scene, 402, 352)
    return scene.finish()


def _sky(scene: Scene) -> None:
    scene.gradient(0, HORIZON, (84, 142, 206), (198, 220, 236))
    for x, y, size in ((110, 62, 1.2), (330, 42, 0.8), (520, 84, 1.4)):
        for dx, dy, rx, ry in ((0, 0, 46, 14), (-26, 6, 30, 10), (28, 5, 34, 11), (6, -10, 26, 12)):
            scene.soft(x + dx * size, y + dy * size, rx * size, ry * size, (250, 250, 252), 190, 5)
    hills = [(x, HORIZON - 26 - 15 * np.sin(x / 67) - 9 * np.sin(x / 23 + 1)) for x in range(0, WIDTH + 8, 8)]
    scene.polygon([(0, HORIZON + 20), *hills, (WIDTH, HORIZON + 20)], (122, 148, 150), 4)


def _ground(scene: Scene) -> None:
    scene.box(0, HORIZON, WIDTH, KERB - HORIZON, (104, 142, 66), 11)
    scene.box(0, KERB - 14, WIDTH, ROAD - KERB + 14, (176, 172, 164), 5)
    for x in range(-10, WIDTH, 34):
        scene.polygon([(x, KERB - 14), (x + 1.5, KERB - 14), (x - 8, ROAD), (x - 9.5, ROAD)], (148, 144, 138))
    scene.box(0, ROAD - 3, WIDTH, 4, (206, 202, 194))
    scene.box(0, ROAD + 1, WIDTH, HEIGHT - ROAD, (84, 86, 92), 6)
    for x in range(-30, WIDTH, 110):
        scene.polygon([(x, 402), (x + 60, 402), (x + 56, 409), (x - 6, 409)], (224, 222, 210), 4)


def _house(scene: Scene, x: float, y: float, width: float, height: float, wall: Colour, roof: Colour) -> None:
    scene.soft(x + width / 2 + 12, y + height, width * 0.56, 7, (40, 52, 34), 130, 4)
    scene.box(x + width * 0.72, y - 66, 16, 52, (142, 84, 70), 8)
    scene.box(x, y, width, height, wall, 6)
    eaves, left, right = y + 4, x + width * 0.22, x + width * 0.78
    scene.polygon([(x - 12, eaves), (left, y - 58), (right, y - 58), (x + width + 12, eaves)], roof, 8)
    ridge = (roof[0] - 18, roof[1] - 18, roof[2] - 18)
    for row in range(1, 5):
        inset = (58 - 12 * row) * 0.78
        scene.box(x - 12 + inset, y - 58 + 12 * row, width + 24 - 2 * inset, 1.3, ridge)
    for column in (0.1, 0.42, 0.74):
        for top in (0.14, 0.56):
            if (column, top) != (0.42, 0.56):
                _window(scene, x + width * column, y + height * top, width * 0.17, height * 0.24)
    scene.box(x + width * 0.42, y + height * 0.56, width * 0.17, height * 0.44, (92, 62, 44), 5)
    scene.ellipse(x + width * 0.56, y + height * 0.79, 1.8, 1.8, (220, 196, 120))
    scene.box(x + width * 0.38, y + height - 4, width * 0.25, 6, (158, 152, 144), 3)


def _window(scene: Scene, x: float, y: float, width: float, height: float) -> None:
    scene.box(x - 2.5, y - 2.5, width + 5, height + 5, (238, 236, 228))
    scene.box(x, y, width, height, (74, 98, 122), 5)
    scene.polygon(
        [(x, y + height), (x, y + height * 0.4), (x + width * 0.6, y), (x + width * 0.9, y)], (128, 156, 178)
    )
    scene.box(x + width / 2 - 0.8, y, 1.6, height, (238, 236, 228))
    scene.box(x, y + height / 2 - 0.8, width, 1.6, (238, 236, 228))


def _tree(scene: Scene, x: float, y: float, size: float) -> None:
    scene.soft(x + 10, y, 46 * size, 6, (34, 48, 26), 140, 4)
    trunk = [
        (x - 7 * size, y),
        (x - 3.5 * size, y - 70 * size),
        (x + 3.5 * size, y - 70 * size),
        (x + 7 * size, y),
    ]
    scene.polygon(trunk, (92, 70, 50), 10)
    for _ in range(34):
        angle, radius = scene.random.uniform(0, 2 * np.pi), scene.random.uniform(0, 1) ** 0.5
        dx, dy = 36 * size * radius * np.cos(angle), 40 * size * radius * np.sin(angle)
        light = int(26 * (-dx / (40 * size) - dy / (40 * size)))
        leaf = (58 + light, 102 + light, 42 + light // 2)
        blob = scene.random.uniform(10, 17) * size
        scene.ellipse(x + dx, y - 96 * size + dy, blob, blob * 0.85, leaf, 13)


def _fence(scene: Scene, left: int, right: int) -> None:
    for y in (286, 298):
        scene.box(left, y, right - left, 3, (222, 218, 208), 3)
    for x in range(left, right, 11):
        scene.polygon([(x, 308), (x, 282), (x + 3, 278), (x + 6, 282), (x + 6, 308)], (234, 230, 220), 3)


def _lamp(scene: Scene, x: float) -> None:
    scene.box(x - 2, 150, 4, 176, (58, 60, 64), 3)
    scene.box(x - 4, 316, 8, 12, (50, 52, 56), 3)
    scene.box(x - 2, 150, 26, 3, (58, 60, 64))
    scene.polygon([(x + 14, 153), (x + 30, 153), (x + 27, 161), (x + 17, 161)], (246, 238, 196))


def _person(scene: Scene, x: float, y: float) -> None:
    scene.soft(x + 6, y, 17, 4, (60, 60, 56), 150, 2)
    for lean in (-7, 6):
        scene.polygon(
            [(x - 5, y - 34), (x + 5, y - 34), (x + lean + 3, y), (x + lean - 3, y)], (48, 56, 86), 4
        )
        scene.ellipse(x + lean + 2, y - 1, 5, 2.6, (40, 34, 32))
    scene.polygon([(x - 10, y - 62), (x + 10, y - 62), (x + 8, y - 30), (x - 8, y - 30)], (178, 52, 58), 6)
    scene.polygon([(x - 10, y - 62), (x - 6, y - 62), (x - 12, y - 34), (x - 16, y - 36)], (154, 42, 50), 4)
    scene.polygon([(x + 6, y - 62), (x + 10, y - 62), (x + 17, y - 38), (x + 13, y - 35)], (154, 42, 50), 4)
    for hand in (-14, 15):
        scene.ellipse(x + hand, y - 34, 3, 3, (220, 176, 146))
    scene.box(x - 3, y - 67, 6, 7, (206, 160, 132))
    scene.ellipse(x, y - 73, 7.5, 9, (222, 178, 148), 3)
    scene.ellipse(x, y - 78, 8, 5.5, (72, 48, 34), 6)


def _car(scene: Scene, x: float, y: float) -> None:
    """The car of 186x64 pixels whose front is to the left of `x`, `y`: its roof's height."""
    scene.soft(x + 95, y + 60, 104, 9, (30, 32, 36), 190, 4)
    body = [(x, y + 52), (x + 2, y + 32), (x + 38, y + 24), (x + 62, y), (x + 128, y), (x + 158, y + 25),
            (x + 182, y + 30), (x + 188, y + 52), (x + 180, y + 58), (x + 8, y + 58)]  # fmt: skip
    scene.polygon(body, (38, 92, 152), 4)
    scene.polygon([(x + 47, y + 25), (x + 66, y + 5), (x + 94, y + 5), (x + 94, y + 25)], (150, 178, 194), 5)
    scene.polygon(
        [(x + 99, y + 25), (x + 99, y + 5), (x + 125, y + 5), (x + 146, y + 25)], (132, 162, 180), 5
    )
    scene.box(x + 95.5, y + 25, 1.4, 30, (24, 62, 108))
    scene.box(x + 102, y + 32, 11, 2.4, (198, 206, 214))
    scene.box(x + 4, y + 42, 180, 2, (28, 72, 124))
    scene.ellipse(x + 8, y + 37, 6, 4, (244, 238, 204))
    scene.box(x + 179, y + 33, 7, 9, (190, 38, 40))
    for wheel in (38, 148):
        scene.ellipse(x + wheel, y + 56, 17, 17, (26, 28, 32), 5)
        scene.ellipse(x + wheel, y + 56, 9, 9, (170, 174, 178), 5)
        scene.ellipse(x + wheel, y + 56, 3, 3, (80, 84, 88))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("street.png")
    draw_scene().save(target, optimize=True)
