"""Labels of any integer type mean the same; others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast import reference
from catseg_fast.data.resize import shortest_edge_size
from catseg_fast.engine.loss import segmentation_loss
from catseg_fast.evaluation.metrics import ClassCounts
from catseg_fast.labels import class_indices
from support.tiny import CLASSES, tiny_model

INTEGERS = (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("ignore_label", [255, 65535, -1])
def test_an_integer_type_changes_nothing(dtype: torch.dtype, ignore_label: int) -> None:
    values = torch.tensor([[0, 1, 50, 250]])
    labels, classes = values.to(dtype), 300
    assert torch.equal(class_indices(labels, classes, ignore_label), values)
    counts = ClassCounts.of(labels, labels, classes, ignore_label)
    assert counts.truth[[0, 1, 50, 250]].tolist() == [1, 1, 1, 1]
    logits = torch.randn(1, classes, 1, 4)
    for loss in (segmentation_loss, reference.finetune.segmentation_loss):
        assert torch.equal(loss(logits, labels[None], ignore_label), loss(logits, values[None], ignore_label))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64], ids=str)
def test_class_255_counts_where_another_label_is_ignored(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 1, 255, 250]]).to(dtype)
    assert int(ClassCounts.of(labels, labels, 300, 65535).truth.sum()) == 4
    assert int(ClassCounts.of(labels, labels, 255, 255).truth.sum()) == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint16, torch.int64], ids=str)
def test_the_ignore_label_fits_the_type(dtype: torch.dtype) -> None:
    ignored = 100
    assert class_indices(torch.tensor([3, ignored]).to(dtype), 5, ignored).tolist() == [3, ignored]


def test_bool_is_two_classes() -> None:
    labels = torch.tensor([[True, False]])
    assert class_indices(labels, 2).tolist() == [[1, 0]]
    assert ClassCounts.of(labels, labels, 2, 255).truth.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([2, 300]), ValueError, "labels: 300 is not one of 300 classes or the ignore label 255"),
        (torch.tensor([-1]), ValueError, "labels: -1 is not one of 300 classes or the ignore label 255"),
        (torch.tensor([400]).to(torch.uint16), ValueError, "labels: 400 is not one of 300 classes"),
        (torch.tensor([1.0]), TypeError, "labels: expected integers, got torch.float32"),
        ([1, 2], TypeError, "labels: expected a tensor of integers, got list"),
    ],
)
def test_what_is_no_label(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        class_indices(labels, 300, 255)


def test_labels_that_count_are_checked() -> None:
    truth = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert ClassCounts.of(torch.tensor([[0, 7]]), truth, 2, 255).predicted.tolist() == [1, 0]
    with pytest.raises(ValueError, match="labels: 7 is not one of 2 classes"):
        ClassCounts.of(torch.tensor([[7, 0]]), truth, 2, 255)
    with pytest.raises(TypeError, match=r"labels: expected integers, got torch\.float32"):
        ClassCounts.of(torch.tensor([[0.0, 0.0]]), truth, 2, 255)


IMAGE = torch.zeros(3, 24, 12)
ZEROS = torch.zeros(24, 12, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"image": IMAGE}, TypeError, "batched_inputs: expected a list of dicts, got dict$"),
        (IMAGE, TypeError, r"got Tensor; segment\(\) takes a single picture"),
        ("photo.jpg", TypeError, r"got str; segment\(\) takes a single picture"),
        (None, TypeError, r"got NoneType; segment\(\)"),
        ([IMAGE], TypeError, r"batched_inputs\[0\]: expected a dict with an 'image', got Tensor"),
        ([{"file_name": "x"}], ValueError, r"batched_inputs\[0\]\['image'\]: is missing; .*file_name"),
        ([{"image": IMAGE}, {"image": IMAGE.numpy()}], TypeError, r"\[1\]\['image'\]: expected a tensor"),
        ([{"image": IMAGE[:2]}], ValueError, r"\[0\]\['image'\]: shape \(2, 24, 12\) is not \[3, H, W\]"),
        ([{"image": IMAGE, "height": 64.0}], TypeError, r"\[0\]\['height'\]: expected an integer, got 64.0"),
        ([{"image": IMAGE, "width": "64"}], TypeError, r"\[0\]\['width'\]: expected an integer, got '64'"),
        ([{"image": IMAGE, "width": True}], TypeError, r"\[0\]\['width'\]: expected an integer, got True"),
        ([{"image": IMAGE, "width": 0}], ValueError, r"\[0\]\['width'\]: 0 is not positive"),
    ],
)
def test_a_wrong_call_names_the_entry_and_the_key(inputs: Any, error: type[Exception], message: str) -> None:
    model = tiny_model(classes=CLASSES)
    for call in (model, model.label_map):
        with pytest.raises(error, match=message):
            call(inputs)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, "is missing"),
        (ZEROS.numpy(), TypeError, r"expected a tensor \[H, W\], got ndarray"),
        (ZEROS[None], ValueError, r"shape \(1, 24, 12\); expected \[H, W\] = \(24, 12\)"),
        (ZEROS.T, ValueError, r"shape \(12, 24\); expected"),
        (ZEROS[:3, :3], ValueError, r"shape \(3, 3\); expected"),
        (ZEROS.float(), TypeError, "expected integers, got torch.float32"),
        (ZEROS + 5, ValueError, "5 is not one of 5 classes or the ignore label 255"),
    ],
)
def test_a_wrong_label_in_training_names_the_entry(labels: Any, error: type[Exception], message: str) -> None:
    model = tiny_model(classes=CLASSES).train()
    model.set_classes(CLASSES, training=True)
    entry = {"image": IMAGE} if labels is None else {"image": IMAGE, "sem_seg": labels}
    with pytest.raises(error, match=r"batched_inputs\[0\]\['sem_seg'\]: " + message):
        model([entry])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32], ids=str)
def test_labels_of_any_integer_type_train(dtype: torch.dtype) -> None:
    model = tiny_model(classes=CLASSES).train()
    model.set_classes(CLASSES, training=True)

    def loss(labels: Tensor) -> Tensor:
        torch.manual_seed(0)
        result = model([{"image": IMAGE, "sem_seg": labels}])
        assert isinstance(result, dict)
        return result["loss_sem_seg"]

    labels = torch.arange(24 * 12).view(24, 12) % 5
    labels[0] = 255
    assert torch.equal(loss(labels.to(dtype)), loss(labels))


def test_labels_of_smaller_images_are_padded_with_the_ignore_label() -> None:
    model = tiny_model(classes=CLASSES).train()
    model.set_classes(CLASSES, training=True)
    large, small = torch.full((24, 12), 2), torch.full((10, 8), 3)
    padded = torch.full((24, 12), 255)
    padded[:10, :8] = 3

    def loss(labels: Tensor) -> Tensor:
        torch.manual_seed(0)
        entries = [{"image": IMAGE, "sem_seg": large}, {"image": IMAGE[:, :10, :8], "sem_seg": labels}]
        result = model(entries)
        assert isinstance(result, dict)
        return result["loss_sem_seg"]

    assert torch.equal(loss(small), loss(padded))


def detectron2(height: int, width: int, size: int, most: int) -> tuple[int, int]:
    """Return `ResizeShortestEdge.get_output_shape`, the size to which upstream resizes pictures."""
    scale = size * 1.0 / min(height, width)
    if height < width:
        new_height, new_width = float(size), scale * width
    else:
        new_height, new_width = scale * height, float(size)
    if max(new_height, new_width) > most:
        scale = most * 1.0 / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


@pytest.mark.parametrize(("size", "most"), [(640, 2560), (384, 1333), (480, 1333)])
def test_sizes_are_detectron2s(size: int, most: int) -> None:
    assert shortest_edge_size(1024, 29, 640, 2560) == (2560, 72)
    assert shortest_edge_size(256, 263, 384, 1333) == (384, 395)
    generator = torch.Generator().manual_seed(0)
    for height, width in torch.randint(1, 3000, (20000, 2), generator=generator).tolist():
        expected = tuple(max(1, side) for side in detectron2(height, width, size, most))
        assert shortest_edge_size(height, width, size, most) == expected


def test_no_side_vanishes() -> None:
    assert shortest_edge_size(1, 6000, 640, 2560) == (1, 2560)
    assert shortest_edge_size(6000, 1, 640, 2560) == (2560, 1)
