"""Counts per class, and the scores that are computed from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from catseg_fast.evaluation.metrics import ClassCounts
from support.scores import IGNORE, slow_scores


def random_maps(seed: int, classes: int, size: tuple[int, int] = (13, 17)) -> tuple[Tensor, Tensor]:
    """Return labels and truth; some classes occur in one or neither of them, and some pixels do not count."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(np.arange(0, classes, 2), size)
    truth = np.where(generator.random(size) < 0.4, labels, generator.integers(0, max(1, classes - 2), size))
    truth[generator.random(size) < 0.2] = IGNORE
    return torch.from_numpy(labels), torch.from_numpy(truth)


@pytest.mark.parametrize("classes", [1, 5, 19])
def test_scores_are_those_of_a_slow_count(classes: int) -> None:
    pairs = [random_maps(seed, classes) for seed in range(3)]
    counts = ClassCounts.none(classes)
    for labels, truth in pairs:
        counts += ClassCounts.of(labels, truth, classes, IGNORE)
    assert counts.scores() == pytest.approx(slow_scores(pairs, classes), rel=1e-12)


def test_scores_are_those_of_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    classes = 19
    labels, truth = (
        torch.stack(maps) for maps in zip(*(random_maps(s, classes) for s in range(3)), strict=True)
    )
    counts = ClassCounts.of(labels.flatten(1), truth.flatten(1), classes, IGNORE)
    options: dict[str, Any] = {"num_classes": classes, "ignore_index": IGNORE}
    iou = functional.multiclass_jaccard_index(labels, truth, average="none", **options)
    met = counts.truth + counts.predicted > 0
    assert torch.allclose(counts.iou[met].float(), iou[met], atol=1e-6)
    accuracy = functional.multiclass_accuracy(labels, truth, average="none", **options)
    present = counts.truth > 0
    assert torch.allclose(counts.accuracy[present].float(), accuracy[present], atol=1e-6)
    micro = functional.multiclass_accuracy(labels, truth, average="micro", **options)
    assert counts.scores()["pACC"] == pytest.approx(micro.item(), abs=1e-6)
    weighted = functional.multiclass_jaccard_index(labels, truth, average="weighted", **options)
    assert counts.scores()["fwIoU"] == pytest.approx(weighted.item(), abs=1e-6)


def test_classes_that_no_picture_has_count_in_only_one_mean() -> None:
    truth, labels = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 3]])
    scores = ClassCounts.of(labels, truth, 5, IGNORE).scores()
    assert scores["mIoU"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["mIoU_union"] == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_counts_are_exact_beyond_what_floats_hold() -> None:
    big = ClassCounts(*(torch.tensor([2**53, 2**53]) for _ in range(3)))
    one = ClassCounts.of(*torch.zeros(2, 1, 1, dtype=torch.long), 2, IGNORE)
    assert (big + one).truth.tolist() == [2**53 + 1, 2**53]


def test_nothing_to_count() -> None:
    counts = ClassCounts.of(torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), IGNORE), 3, IGNORE)
    assert all(math.isnan(value) for value in counts.scores().values())


@pytest.mark.parametrize(
    ("labels", "truth", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), r"\[2, 3\] and their truth \[3, 2\]"),
        (torch.full((2, 2), 3), torch.zeros(2, 2, dtype=torch.long), "labels: 3 is not one of 3 classes"),
        (torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), 7), "truth: 7 is not one of 3 classes or"),
    ],
)
def test_maps_that_do_not_fit(labels: Tensor, truth: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassCounts.of(labels, truth, 3, IGNORE)


def test_a_pixel_without_a_label_is_wrong_or_left_out() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, IGNORE, IGNORE]])
    labels = torch.tensor([[0, -1, 1, 0], [-1, 2, -1, 0]], dtype=torch.int32)
    wrong = ClassCounts.of(labels, truth, 3, IGNORE)
    assert [x.tolist() for x in (wrong.intersection, wrong.truth, wrong.predicted)] == [
        [1, 1, 1], [2, 2, 2], [2, 1, 1],
    ]  # fmt: skip
    assert wrong.unlabelled == 2
    assert wrong.scores()["pACC"] == 0.5
    left_out = ClassCounts.of(labels, truth, 3, IGNORE, ignore_unlabelled=True)
    assert [x.tolist() for x in (left_out.intersection, left_out.truth, left_out.predicted)] == [
        [1, 1, 1], [1, 2, 1], [2, 1, 1],
    ]  # fmt: skip
    assert left_out.unlabelled == 2
    assert (wrong + left_out).unlabelled == 4
    with pytest.raises(ValueError, match="labels: -2 is not one of 3 classes"):
        ClassCounts.of(labels - 1, truth, 3, IGNORE)
