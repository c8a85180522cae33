"""Effect of a threshold of the scores, with some classes left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast import Segmentation
from catseg_fast.errors import InputError
from catseg_fast.evaluation.thresholds import ScoreCounts, count_scores
from support.scores import IGNORE

CLASSES = ("a", "b", "c", "d")


def test_pixels_are_counted_by_score_and_kind() -> None:
    truth = torch.tensor([[0, 0, 2, 2, 1, 1, IGNORE]])
    labels = torch.tensor([[0, 1, 1, 1, 0, 1, 0]], dtype=torch.int32)  # of the kept classes 0 and 2
    scores = torch.tensor([[0.9, 0.35, 0.6, 0.2, 0.7, 0.1, 0.5]])
    counts = ScoreCounts()
    counts.add(Segmentation(labels, scores, ("a", "c")), truth, [0, 2], IGNORE)
    assert [int(part.sum()) for part in (counts.right, counts.wrong, counts.strange)] == [3, 1, 2]
    lowest = counts.effect(0)
    assert (lowest.right, lowest.wrong, lowest.unlabelled, lowest.rejected) == (0.75, 0.25, 0, 0)
    middle = counts.effect(0.4)
    assert (middle.right, middle.wrong, middle.unlabelled, middle.rejected) == (0.5, 0, 0.5, 0.5)
    assert counts.effect(0.2).right == 0.75  # a score of 0.2 is not below 0.2
    assert counts.best().balance == max(counts.effect(step / 100).balance for step in range(101))
    assert counts.best().balance == pytest.approx((0.75 + 0.5) / 2)


def test_each_part_of_the_classes_is_left_out_once() -> None:
    entries = [{"image": torch.zeros(3, 2, 4), "sem_seg": torch.arange(8).view(2, 4) % 4}]
    asked: list[list[str]] = []

    def segment(image: Tensor, classes: list[str]) -> Segmentation:
        asked.append(classes)
        size: Any = image.shape[1:]
        return Segmentation(torch.zeros(size, dtype=torch.int32), torch.full(size, 0.5), tuple(classes))

    counts = count_scores(segment, entries, CLASSES, IGNORE, parts=2)
    assert asked == [["b", "d"], ["a", "c"]]
    assert [int(part.sum()) for part in (counts.right, counts.wrong, counts.strange)] == [4, 4, 8]
    for parts in (1, 5):
        with pytest.raises(InputError, match=f"parts: expected 2 to 4, the number of classes, got {parts}"):
            count_scores(segment, entries, CLASSES, IGNORE, parts)
