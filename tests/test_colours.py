"""Colours of classes: those in their names, and those that differ from their surroundings."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from catseg_fast.data.scenes import SPLITS
from catseg_fast.output.colours import class_colours, colours_for, named_colour, shades

BASIC = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "white", "black", "brown")
RGB = np.array([named_colour(word) for word in BASIC], float)


def distance(a, b) -> float:
    """Return the weighted difference of two colours, by the formula that colours_for uses."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    red = (a[0] + b[0]) / 2
    return float((np.array([2 + red / 256, 4, 2 + (255 - red) / 256]) * (a - b) ** 2).sum() ** 0.5)


def halves(left: int, right: int, photo=(100, 100, 100), beside=None) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of two classes, left and right, and a photo of two colours."""
    labels = np.full((20, 30), left)
    labels[:, 15:] = right
    pixels = np.empty((20, 30, 3), np.uint8)
    pixels[:, :15], pixels[:, 15:] = photo, beside or photo
    return labels, pixels


def test_colours_are_deterministic_distinct_and_a_prefix_of_longer_lists():
    colours = class_colours(1000)
    assert colours.shape == (1000, 3)
    assert colours.dtype == np.uint8
    assert np.array_equal(class_colours(7), colours[:7])
    assert len(np.unique(colours, axis=0)) == 1000


def test_neighbouring_colours_differ_clearly_for_thousands_of_classes():
    colours = class_colours(5000).astype(int)
    for distance in (1, 2):
        assert np.abs(colours[distance:] - colours[:-distance]).sum(axis=1).min() > 150


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("striped red ring", "red"),
        ("Red-brick wall", "red"),
        ("car, crimson car", "crimson"),
        ("black and white photo", "black"),
        ("golden retriever", "golden"),
        ("polar bear, white bear", "white"),
        ("blackboard", None),
        ("tree", None),
        ("", None),
        ("狗", None),
    ],
)
def test_the_first_colour_word_counts(name: str, like: str | None) -> None:
    assert named_colour(name) == (None if like is None else named_colour(like))
    assert like is None or named_colour(name) is not None


@pytest.mark.parametrize("word", BASIC)
def test_shades_go_by_their_name(word: str) -> None:
    found = shades(named_colour(word), 24)
    assert found[0].tolist() == list(named_colour(word))
    assert len(np.unique(found, axis=0)) == 24
    for colour in found:
        assert BASIC[int(np.argmin([distance(colour, other) for other in RGB]))] == word


def test_classes_have_the_colour_of_their_name_in_any_picture() -> None:
    """There are 200 classes in a picture in which each touches many others."""
    names = SPLITS["held-out-200"].class_names
    random = np.random.default_rng(0)
    labels = random.integers(0, len(names), (60, 60))
    photo = random.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    colours = colours_for(names, labels, photo)
    words = [next((word for word in BASIC if word in name.split()), None) for name in names]
    assert sum(word is not None for word in words) == 192
    for name, word, colour in zip(names, words, colours, strict=True):
        if word is not None:
            assert BASIC[int(np.argmin([distance(colour, other) for other in RGB]))] == word, name


def test_hues_stay_near_the_word_s() -> None:
    hues = [colorsys.rgb_to_hsv(*(x / 255 for x in colour))[0] for colour in shades((40, 80, 215), 50)]
    assert max(hues) - min(hues) < 0.05


def test_without_conflict_colours_are_the_palette_s_and_those_of_absent_classes_stay() -> None:
    classes = ["sky", "grass", "tree", "red car"]
    colours = colours_for(classes, *halves(0, 2))
    assert np.array_equal(colours[:3], class_colours(3))
    assert colours[3].tolist() == list(named_colour("red"))


def test_a_class_gives_way_to_the_colour_of_a_name_beside_it() -> None:
    """The palette has a colour like the name's: the class with that colour gets another one."""
    palette = class_colours(60)
    alike = int(np.argmin([distance(colour, named_colour("red")) for colour in palette]))
    classes = [f"class {i}" for i in range(60)] + ["red car"]
    assert distance(palette[alike], named_colour("red")) < 80
    colours = colours_for(classes, *halves(alike, 60))
    assert colours[60].tolist() == list(named_colour("red"))
    assert 0.55 * distance(colours[alike], colours[60]) >= 149
    others = np.delete(np.arange(60), alike)
    assert np.array_equal(colours[others], palette[others])


def test_the_photo_below_counts() -> None:
    """Two colours that differ enough, over photos with colours for which the blends would look alike."""
    palette = class_colours(2).astype(float)
    shift = 0.55 / 0.45 * (palette[1] - palette[0]) / 2
    photo, beside = 128 + shift, 128 - shift
    assert min(photo.min(), beside.min()) >= 0
    assert max(photo.max(), beside.max()) <= 255
    labels, pixels = halves(0, 1, tuple(photo.round()), tuple(beside.round()))
    blends = [0.45 * below + 0.55 * colour for below, colour in ((photo, palette[0]), (beside, palette[1]))]
    assert distance(*blends) < 1
    colours = colours_for(["a", "b"], labels, pixels)
    assert colours[0].tolist() == palette[0].tolist()
    blends = [0.45 * pixels[0, x] + 0.55 * colours[i] for x, i in ((0, 0), (-1, 1))]
    assert distance(*blends) > 100


def test_two_of_one_colour_word_take_different_shades() -> None:
    classes = ["red ring", "red disc"]
    colours = colours_for(classes, *halves(0, 1))
    assert distance(*colours) > 60


def test_one_class_and_no_class_beside_it() -> None:
    labels, photo = halves(1, 1)
    assert np.array_equal(colours_for(["a", "b"], labels, photo), class_colours(2))
