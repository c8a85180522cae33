"""Accuracy by attribute on generated scenes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from catseg_fast.data.scenes.attributes import ATTRIBUTES, AttributeCounts
from catseg_fast.data.scenes.words import Composition

GRASS, DISC, RING, BLUE_DISC, DOTTED_DISC = range(5)
CLASSES = ("grass", Composition(0, 0, 0), Composition(0, 0, 1), Composition(0, 5, 0), Composition(2, 0, 0))


def counts_of(found: list[int], truth: list[int]) -> AttributeCounts:
    counts = AttributeCounts(CLASSES)
    counts.add(np.array([found]), np.array([truth]))
    return counts


def test_each_word_counts_by_itself() -> None:
    counts = counts_of(
        [DISC, RING, RING, BLUE_DISC, DOTTED_DISC, GRASS, DISC, GRASS],
        [DISC, DISC, DISC, DISC, DISC, DISC, GRASS, GRASS],
    )
    found = counts.accuracies()
    assert tuple(found) == ATTRIBUTES
    assert [found[name].accuracy for name in ATTRIBUTES] == [4 / 6, 4 / 6, 3 / 6]
    assert [found[name].among_alike for name in ATTRIBUTES] == [1 / 2, 1 / 2, 1 / 3]
    assert [found[name].chance for name in ATTRIBUTES] == [1 / 2, 1 / 2, 1 / 2]
    assert counts.names == 1 / 6


def test_a_guess_among_alike_classes_is_at_chance() -> None:
    """Pixels of both shapes get both shapes equally often."""
    found = counts_of([DISC, RING] * 10, [DISC] * 10 + [RING] * 10).accuracies()
    assert found["shape"].among_alike == found["shape"].chance == 0.5
    assert found["pattern"].accuracy == found["colour"].accuracy == 1


def test_chance_weighs_classes_by_their_pixels() -> None:
    """There is no other blue shape than the disc: it cannot be confused."""
    found = counts_of([RING, BLUE_DISC, BLUE_DISC, BLUE_DISC], [RING, BLUE_DISC, BLUE_DISC, BLUE_DISC])
    assert found.accuracies()["shape"].chance == pytest.approx((0.5 + 3) / 4)


def test_pictures_add_up() -> None:
    counts = counts_of([DISC], [DISC])
    counts.add(np.array([[RING]], np.uint16), np.array([[DISC]], np.uint8))
    assert counts.names == 0.5
    assert counts.confusion.sum() == 2


def test_without_things_there_is_no_accuracy() -> None:
    counts = counts_of([GRASS], [GRASS])
    assert math.isnan(counts.names)
    assert all(math.isnan(found.accuracy) for found in counts.accuracies().values())


def test_bad_label_maps() -> None:
    with pytest.raises(ValueError, match=r"found: expected the shape of truth, \(1, 1\), got \(1, 2\)"):
        AttributeCounts(CLASSES).add(np.zeros((1, 2), int), np.zeros((1, 1), int))
    with pytest.raises(ValueError, match=r"found: expected labels in 0\.\.4, got 5\.\.5"):
        counts_of([5], [0])
    with pytest.raises(ValueError, match=r"truth: expected labels in 0\.\.4, got -1\.\.0"):
        counts_of([0, 0], [-1, 0])
