"""Names of the contents of scenes: compositions of pattern, colour and shape, and grounds.

A fifth of the compositions is held out: they are in no training scene, while each of their words, and each
pair of words, is. Each word has a synonym; the name of a training class has at most one synonym, so that
phrases of several synonyms are held out, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from catseg_fast.errors import InputError

# Mean RGB of each colour, in 0..255.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 40),
    "orange": (240, 135, 25),
    "yellow": (245, 220, 40),
    "green": (45, 150, 55),
    "turquoise": (50, 200, 190),
    "blue": (40, 75, 200),
    "purple": (125, 50, 160),
    "pink": (245, 140, 180),
    "white": (242, 242, 240),
    "black": (28, 28, 32),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "heart", "moon")
GROUNDS = (
    "wooden floor",
    "brick wall",
    "grass",
    "sand",
    "water",
    "tiled floor",
    "cloudy sky",
    "gravel",
)
SYNONYMS = {
    "red": "crimson", "orange": "amber", "yellow": "golden", "green": "emerald", "turquoise": "cyan",
    "blue": "navy", "purple": "violet", "pink": "rose", "white": "ivory", "black": "ebony",
    "plain": "uniform", "striped": "banded", "dotted": "spotted", "checked": "chequered",
    "disc": "circle", "ring": "hoop", "square": "box", "triangle": "wedge", "star": "asterisk",
    "cross": "plus sign", "heart": "valentine", "moon": "crescent",
    "wooden floor": "wood planks", "brick wall": "masonry", "grass": "lawn", "sand": "beach", "water": "sea",
    "tiled floor": "tiles", "cloudy sky": "clouds", "gravel": "pebbles",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Composition:
    """A thing: its pattern, colour and shape by index."""

    pattern: int
    colour: int
    shape: int

    @property
    def words(self) -> tuple[str, str, str]:
        """Pattern, colour and shape in words."""
        return PATTERNS[self.pattern], tuple(COLOURS)[self.colour], SHAPES[self.shape]

    @property
    def name(self) -> str:
        """The name, such as "striped red ring"."""
        return " ".join(self.words)

    @property
    def held_out(self) -> bool:
        """True if it is in no training scene."""
        return (2 * self.pattern + self.colour + 3 * self.shape) % 5 == 0

    @property
    def label(self) -> str:
        """The name, followed by those with one word replaced: the synonyms of a training class."""
        words = self.words
        variants = [
            " ".join(SYNONYMS[word] if i == place else word for i, word in enumerate(words))
            for place in range(len(words))
        ]
        return ", ".join([self.name, *variants])

    @property
    def synonym(self) -> str:
        """The name with every word replaced."""
        return " ".join(SYNONYMS[word] for word in self.words)


COMPOSITIONS = tuple(
    Composition(pattern, colour, shape)
    for pattern in range(len(PATTERNS))
    for colour in range(len(COLOURS))
    for shape in range(len(SHAPES))
)
TRAINED = tuple(thing for thing in COMPOSITIONS if not thing.held_out)
HELD_OUT = tuple(thing for thing in COMPOSITIONS if thing.held_out)


def choose_held_out(count: int, seed: int = 0) -> tuple[Composition, ...]:
    """Choose held-out compositions with patterns, colours and shapes spread as evenly as possible.

    Raises:
        InputError: if there are fewer.
    """
    if not 0 < count <= len(HELD_OUT):
        raise InputError(f"count: {count} is not in 1..{len(HELD_OUT)}, the number of held-out compositions")
    rest = [HELD_OUT[i] for i in np.random.default_rng(seed).permutation(len(HELD_OUT))]
    chosen: list[Composition] = []

    def crowding(thing: Composition) -> int:
        """Return how often the parts of a thing were already chosen."""
        return sum(
            (thing.pattern == other.pattern) + (thing.colour == other.colour) + (thing.shape == other.shape)
            for other in chosen
        )

    while len(chosen) < count:
        best = min(rest, key=crowding)
        rest.remove(best)
        chosen.append(best)
    return tuple(sorted(chosen))
