"""Overlays and label maps of a segmentation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast.output.colours import class_colours, colours_for
from catseg_fast.output.overlay import class_shares, label_png, overlay

CLASSES = ["sky", "grass", "tree"]


def halves(height, width):
    """Return a grey image whose left half is class 0 and whose right half is class 2."""
    labels = torch.zeros(height, width, dtype=torch.int32)
    labels[:, width // 2 :] = 2
    return torch.full((3, height, width), 100.0), labels


def test_shares():
    _, labels = halves(4, 6)
    assert class_shares(labels, 3).tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("bad", [-2, 3])
def test_a_label_without_a_class_is_refused(bad):
    image, labels = halves(4, 6)
    labels[0, 0] = bad
    with pytest.raises(ValueError, match=rf"labels: expected values in 0\.\.2 for 3 classes, got .*{bad}"):
        overlay(image, labels, CLASSES)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_colours_are_blended_by_alpha(alpha):
    image, labels = halves(20, 30)
    picture = np.asarray(overlay(image, labels, CLASSES, alpha, legend=False)).astype(float)
    assert picture.shape == (20, 30, 3)
    colours = class_colours(3).astype(float)
    for x, label in ((3, 0), (25, 2)):
        expected = (1 - alpha) * 100 + alpha * colours[label]
        np.testing.assert_allclose(picture[10, x], expected, atol=1)
    np.testing.assert_allclose(picture[10, 15], (1 - alpha) * 100 + alpha * 255, atol=1)  # the line between


@pytest.mark.parametrize("size", [(1, 1), (48, 64), (1, 900), (900, 1), (1200, 1600)])
def test_legend_stands_beside_the_picture(size):
    image, labels = halves(*size)
    plain = overlay(image, labels, CLASSES, legend=False)
    full = overlay(image, labels, CLASSES)
    factor = max(1, round(360 / max(size)))
    assert full.width > plain.width * factor
    assert full.height >= plain.height * factor
    corner = full.crop((0, 0, plain.width * factor, plain.height * factor))
    if factor == 1:
        assert corner.tobytes() == plain.tobytes()
    panel = np.asarray(full.crop((plain.width * factor, 0, full.width, full.height))).reshape(-1, 3)
    present = {tuple(colour) for colour in np.unique(panel, axis=0).tolist()}
    colours = [tuple(colour) for colour in class_colours(3).tolist()]
    assert colours[2] in present  # the swatches, only of the classes present
    assert colours[1] not in present


def drawn_texts(monkeypatch, *arguments, **options):
    """Return the texts of the legend."""
    from PIL import ImageDraw

    texts = []
    draw = ImageDraw.ImageDraw.text

    def record(self, position, text, *rest, **kwargs):
        texts.append(text)
        return draw(self, position, text, *rest, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    overlay(*arguments, **options)
    return texts


def test_legend_is_sorted_by_area_and_sums_up_the_rest(monkeypatch):
    labels = torch.tensor([[4] * 50 + [1] * 30 + [0] * 12 + [3] * 8])
    names = ["a", "b", "c", "d", "e"]
    texts = drawn_texts(monkeypatch, torch.zeros(3, 1, 100), labels, names, max_legend=2)
    assert texts == ["e", "50.0%", "b", "30.0%", "… and 2 more", "20.0%"]


def test_legend_of_tiny_shares_and_long_names(monkeypatch):
    labels = torch.zeros(100, 100, dtype=torch.int32)
    labels[0, :5] = 1
    texts = drawn_texts(monkeypatch, torch.zeros(3, 100, 100), labels, ["person, " * 20, "b"])
    assert texts[0].startswith("person, person")
    assert texts[0].endswith("…")
    assert len(texts[0]) < 40
    assert texts[1:] == ["100.0%", "b", "<0.1%"]


def test_uint8_image_and_long_labels_are_taken_too():
    image, labels = halves(8, 8)
    expected = overlay(image, labels, CLASSES)
    assert overlay(image.byte(), labels.long(), CLASSES).tobytes() == expected.tobytes()


def test_wrong_shapes_and_alpha():
    image, labels = halves(4, 6)
    with pytest.raises(ValueError, match=r"got labels \[6, 4\] and image \[3, 4, 6\]"):
        overlay(image, labels.T, CLASSES)
    with pytest.raises(ValueError, match=r"image \[1, 4, 6\]"):
        overlay(image[:1], labels, CLASSES)
    with pytest.raises(ValueError, match=r"alpha: expected a number in 0\.\.1, got 1\.5"):
        overlay(image, labels, CLASSES, alpha=1.5)


def test_colours_can_be_given():
    image, labels = halves(20, 30)
    given = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8)
    picture = np.asarray(overlay(image, labels, CLASSES, 1.0, legend=False, colours=given))
    assert picture[5, 3].tolist() == [1, 2, 3]
    assert picture[5, 25].tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match=r"colours: expected \[T, 3\] for 3 classes, got shape \[2, 3\]"):
        overlay(image, labels, CLASSES, colours=given[:2])


def test_a_white_swatch_is_outlined():
    labels = torch.zeros(400, 400, dtype=torch.int32)
    full = np.asarray(overlay(torch.full((3, 400, 400), 100.0), labels, ["white wall"])).astype(int)
    swatch = full[15:35, 405:435].reshape(-1, 3)
    assert (np.abs(swatch - 255).sum(axis=1) == 0).any()  # the white itself
    assert (np.abs(swatch - 190).sum(axis=1) < 20).sum() > 20


def test_label_png_keeps_sixteen_bits():
    labels = torch.tensor([[0, 1, 255], [256, 65534, -1]], dtype=torch.int32)
    image = label_png(labels)
    assert image.mode == "I;16"
    file = io.BytesIO()
    image.save(file, "PNG")
    with Image.open(file) as back:
        assert np.array(back).tolist() == [[0, 1, 255], [256, 65534, 65535]]


@pytest.mark.parametrize("bad", [-2, 65535])
def test_label_png_refuses_what_does_not_fit(bad):
    with pytest.raises(ValueError, match=rf"labels: a 16-bit PNG holds 0\.\.65534 and -1, got .*{bad}"):
        label_png(torch.tensor([[5, bad]]))


def test_where_no_class_fits_the_picture_stays_and_the_legend_says_so():
    image, labels = halves(60, 90)
    image = torch.linspace(0, 255, 60 * 90).view(1, 60, 90).expand(3, -1, -1)
    labels[20:40, 60:80] = -1
    plain = np.asarray(overlay(image, labels, CLASSES, 0.7, legend=False))
    inside = (slice(22, 39), slice(62, 79))
    expected = image.round().byte().permute(1, 2, 0).numpy()
    apart = np.abs(plain[inside].astype(int) - expected[inside])
    assert apart.max() <= 1  # blending rounds
    assert np.abs(plain[45:, 62:79].astype(int) - expected[45:, 62:79]).max() > 30
    alone = overlay(image, torch.full_like(labels, -1), CLASSES)
    assert alone.width > 4 * 90  # there is a legend
    with_none = np.asarray(overlay(image, labels, CLASSES))
    filled = np.asarray(overlay(image, labels.clamp(min=0), CLASSES))
    assert with_none.shape[1] > filled.shape[1]  # "none of these" is wider than the names


@pytest.mark.parametrize("alpha", [0.55, 1.0])
def test_no_class_changes_no_colour(alpha):
    """The label -1 is not a class, from which others would have to differ."""
    photo = np.full((40, 60, 3), 128, np.uint8)
    labels = np.zeros((40, 60), np.int32)
    labels[:, 20:] = 1
    expected = colours_for(["red car", "wall"], labels, photo, alpha)
    labels[:5] = -1
    assert np.array_equal(colours_for(["red car", "wall"], labels, photo, alpha), expected)


def test_only_large_classes_are_in_the_legend():
    labels = torch.zeros(100, 100, dtype=torch.int32)
    labels[:10], labels[10:11] = 1, 2
    large = overlay(torch.zeros(3, 100, 100), labels, ["sky", "oak", "ant"], present=0.05)
    few = overlay(torch.zeros(3, 100, 100), labels, ["sky", "oak", "ant"], max_legend=2)
    assert few.tobytes() == large.tobytes()  # "… and 1 more"
    with pytest.raises(ValueError, match=r"present: expected a number in 0\.\.1, got 2"):
        overlay(torch.zeros(3, 100, 100), labels, ["sky", "oak", "ant"], present=2)
