"""Colours of classes: near the colour in a class's name, and different from adjacent classes."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from catseg_fast.output.strips import row_strips

Colours = NDArray[np.uint8]

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_BLUE = 0.58  # the first class's hue
_SATURATION = np.array([0.85, 0.55, 1.0])
_VALUE = np.array([0.95, 1.0, 0.7, 0.85, 0.55])

# Colour words besides the CSS names of Pillow, and CSS names whose usual meaning differs.
_WORDS = {
    "amber": (255, 175, 0), "blond": (235, 210, 140), "blonde": (235, 210, 140), "brown": (130, 80, 45),
    "ebony": (35, 32, 34), "emerald": (30, 165, 100), "golden": (235, 185, 45), "green": (30, 150, 50),
    "magenta": (215, 30, 160), "orange": (245, 135, 20), "pink": (245, 140, 180), "purple": (125, 45, 160),
    "red": (215, 30, 35), "rose": (235, 95, 135), "scarlet": (225, 40, 20), "blue": (40, 80, 215),
    "yellow": (248, 225, 45),
}  # fmt: skip
_TO_WHITE, _TO_BLACK, _TURN = 0.15, 0.17, 0.012  # how far shades of a colour go from it; turns of hue
_CANDIDATES = 24  # colours that are tried for a class
_ADJACENT = 270.0  # distance to keep from a class that touches; laid over a picture, alpha times this
_ANYWHERE = 70.0  # distance of the colours themselves to keep from those of all other classes


def class_colours(count: int) -> Colours:
    """Return colours of `count` classes, uint8 `[count, 3]`; those of neighbouring indices differ clearly.

    Hues step by the golden ratio, so that any prefix covers the circle evenly; saturation and value cycle
    with coprime periods. A class's colour does not depend on `count`.
    """
    index = np.arange(count)
    hue = (_BLUE + index * _GOLDEN_RATIO) % 1
    saturation, value = _SATURATION[index % len(_SATURATION)], _VALUE[index % len(_VALUE)]
    # HSV to RGB; https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    ramp = (np.array([5, 3, 1]) + hue[:, None] * 6) % 6
    dip = np.clip(np.minimum(ramp, 4 - ramp), 0, 1)
    return (255 * value[:, None] * (1 - saturation[:, None] * dip)).round().astype(np.uint8)


def named_colour(name: str) -> tuple[int, int, int] | None:
    """Return the colour of the first colour word in a class's name: red for "red car, crimson car"."""
    for word in re.findall(r"[a-z]+", name.lower()):
        if word in _WORDS:
            return _WORDS[word]
        if word in ImageColor.colormap:
            red, green, blue, *_ = ImageColor.getrgb(word)
            return red, green, blue
    return None


def shades(colour: tuple[int, int, int], count: int) -> Colours:
    """Return shades of a colour with the same name, uint8 `[count, 3]`; the first is the colour itself."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in colour))
    lightness = float(np.dot(colour, (0.299, 0.587, 0.114)) / 255)
    up = _TO_WHITE if lightness < 0.85 else 0.0
    down = _TO_BLACK if lightness > 0.25 else 0.0
    result = []
    for k in range(count):
        step = (k * _GOLDEN_RATIO) % 1  # from the colour up to the lightest shade, then down to the darkest
        share = step if not (up and down) else 2 * step if step < 0.5 else 2 * step - 1
        lighter = bool(up) and (not down or step < 0.5)
        turn = _TURN * ((k * 0.37 + 0.5) % 1 - 0.5) * 2 if k else 0.0
        rgb = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
        amount = share * (up if lighter else down)
        result.append(rgb + (float(lighter) - rgb) * amount)
    return (255 * np.array(result).reshape(count, 3)).round().astype(np.uint8)


def colours_for(
    classes: Sequence[str],
    labels: NDArray[np.integer],
    photo: NDArray[np.uint8],
    alpha: float = 0.55,
) -> Colours:
    """Return colours of classes over a picture, uint8 `[T, 3]`.

    A class with a colour word in its name has a shade of that colour. The others have those of
    `class_colours`. If two adjacent classes would look alike, the smaller one gets another shade, or another
    colour if its name has no colour word. A class without a colour word is changed before one with it.

    Args:
        classes: the class names.
        labels: indices into `classes` `[H, W]`; -1 where no class fits.
        photo: the picture, RGB `[H, W, 3]`.
        alpha: share of the colours when they are laid over the picture.
    """
    count = len(classes)
    colours, named = _by_name(classes)
    pixels, present, means, beside = _areas(labels, photo, count)
    reach = alpha * _ADJACENT
    spare = class_colours(count + _CANDIDATES)[count:]
    seen = np.empty_like(means)  # each class's pixels on average, its colour over them
    done: list[int] = []
    order = sorted(range(len(present)), key=lambda i: (present[i] not in named, -pixels[i], i))
    for i in order:
        label = int(present[i])
        more = shades(named[label], _CANDIDATES) if label in named else spare
        candidates = np.concatenate([colours[label][None], more]).astype(float)
        near = [j for j in done if beside[i, j]]
        mine = (1 - alpha) * means[i] + alpha * candidates
        room = _distance(mine[:, None], seen[near][None]).min(axis=1, initial=reach) / max(reach, 1e-9)
        if label not in named:
            others = _distance(candidates[:, None], colours[present[done]][None].astype(float))
            room = np.minimum(room, others.min(axis=1, initial=_ANYWHERE) / _ANYWHERE)
        best = int(room.argmax())  # the first of those that have room enough
        colours[label], seen[i] = candidates[best], mine[best]
        done.append(i)
    return colours


def palette(classes: Sequence[str]) -> Colours:
    """Return colours of classes that are the same for every picture, uint8 `[T, 3]`."""
    return _by_name(classes)[0]


def _by_name(classes: Sequence[str]) -> tuple[Colours, dict[int, tuple[int, int, int]]]:
    """Colours that do not depend on a picture, and the colour of each class that names one."""
    colours = class_colours(len(classes))
    named: dict[int, tuple[int, int, int]] = {}
    alike: dict[tuple[int, int, int], list[int]] = {}
    for index, name in enumerate(classes):
        colour = named_colour(name)
        if colour is not None:
            named[index] = colour
            alike.setdefault(colour, []).append(index)
    for colour, indices in alike.items():
        colours[indices] = shades(colour, len(indices))
    return colours, named


def _areas(
    labels: NDArray[np.integer], photo: NDArray[np.uint8], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return, of the classes that occur, pixel counts, indices, mean pixels, and which of them touch.

    Indices of all rows at once would take 8 bytes per pixel.
    """
    strips = row_strips(*labels.shape)
    pixels = np.zeros(count, np.int64)
    for rows in strips:
        pixels += np.bincount(labels[rows].ravel().astype(np.int64) + 1, minlength=count + 1)[1:]
    present = pixels.nonzero()[0]
    last = len(present)  # where no class fits
    place = np.append(np.searchsorted(present, np.arange(count)), last)
    sums = np.zeros((last + 1, 3))
    beside = np.zeros((last + 1, last + 1), bool)
    for rows in strips:
        index = place[labels[rows]].ravel()
        for channel in range(3):
            sums[:, channel] += np.bincount(index, photo[rows, :, channel].ravel(), last + 1)
        edge = labels[max(0, rows.start - 1) : rows.stop]  # with the row above
        beside |= _touching(place[edge], last + 1)
    pixels = pixels[present]
    return pixels, present, sums[:-1] / pixels[:, None], beside


def _touching(index: NDArray[np.integer], count: int) -> NDArray[np.bool_]:
    """Find which of `count` values are adjacent somewhere in a map: bool `[count, count]`."""
    touching = np.zeros((count, count), bool)
    for a, b in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        differ = a != b
        touching[a[differ], b[differ]] = touching[b[differ], a[differ]] = True
    return touching


def _distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the perceived difference of colours (0 to 765, en.wikipedia.org/wiki/Color_difference#sRGB)."""
    red = (a[..., 0] + b[..., 0]) / 2
    weights = np.stack([2 + red / 256, np.full_like(red, 4.0), 2 + (255 - red) / 256], axis=-1)
    return np.sqrt((weights * (a - b) ** 2).sum(axis=-1))
