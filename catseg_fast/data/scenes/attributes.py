"""Accuracy on generated scenes by attribute: pattern, colour and shape of things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catseg_fast.data.scenes.dataset import Thing
from catseg_fast.errors import InputError

ATTRIBUTES = ("pattern", "colour", "shape")


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of an attribute over pixels whose truth is a thing.

    Attributes:
        accuracy: share of these pixels whose class has the true word; a ground has none.
        among_alike: the same share among pixels whose two other words are right.
        chance: expected share of a guess among the classes whose two other words are right.
    """

    accuracy: float
    among_alike: float
    chance: float


class AttributeCounts:
    """Counts pixels by true and found class, and derives accuracies from them.

    Args:
        classes: the classes of the label indices: grounds by name, and compositions.

    Attributes:
        confusion: pixels of a true class (row) that got a class (column), int64 `[T, T]`.
    """

    def __init__(self, classes: Sequence[Thing]) -> None:
        count = len(classes)
        self.confusion = np.zeros((count, count), np.int64)
        self._words = np.array(
            [(-1, -1, -1) if isinstance(c, str) else (c.pattern, c.colour, c.shape) for c in classes]
        ).reshape(count, 3)

    def add(self, found: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        """Count the pixels of a label map and of the true one, both `[H, W]`.

        Raises:
            InputError: if their shapes differ, or a label is not a class index.
        """
        count = len(self.confusion)
        if found.shape != truth.shape:
            raise InputError(f"found: expected the shape of truth, {truth.shape}, got {found.shape}")
        for name, labels in (("found", found), ("truth", truth)):
            if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < count:
                raise InputError(
                    f"{name}: expected labels in 0..{count - 1}, got {labels.min()}..{labels.max()}"
                )
        pairs = truth.astype(np.int64).ravel() * count + found.astype(np.int64).ravel()
        self.confusion += np.bincount(pairs, minlength=count * count).reshape(count, count)

    @property
    def names(self) -> float:
        """Return the share of the things' pixels whose three words are all right; NaN if there are none."""
        is_thing = self._words[:, 0] >= 0
        return _ratio(np.diag(self.confusion)[is_thing].sum(), self.confusion[is_thing].sum())

    def accuracies(self) -> dict[str, Accuracy]:
        """Return the accuracy of each of `ATTRIBUTES`; NaN if no pixel counts."""
        is_thing = self._words[:, 0] >= 0
        things = self.confusion * is_thing[:, None]
        equal = (self._words[:, None] == self._words) & (is_thing[:, None] & is_thing)[..., None]
        result = {}
        for place, name in enumerate(ATTRIBUTES):
            alike = np.delete(equal, place, axis=2).all(axis=2)
            right = equal[..., place]
            guesses = (things * alike).sum(axis=1)
            chance = guesses / np.maximum(alike.sum(axis=1), 1)
            result[name] = Accuracy(
                _ratio(things[right].sum(), things.sum()),
                _ratio(things[right & alike].sum(), guesses.sum()),
                _ratio(chance.sum(), guesses.sum()),
            )
        return result


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
