"""Effect of `min_score` on labelled pictures, with parts of the classes left out in turn.

Pixels of a class that is left out should have the label "none of these", all others their class's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from catseg_fast.errors import InputError
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.labels import class_indices

BINS = 100  # of scores: 0.00, 0.01, …


@dataclass(frozen=True)
class Effect:
    """Effect of a threshold.

    Attributes:
        min_score: the threshold.
        right: share of the pixels of named classes that have their class.
        wrong: share of these that have another class.
        unlabelled: share of these that have none.
        rejected: share of the pixels of classes that are left out that have none.
    """

    min_score: float
    right: float
    wrong: float
    unlabelled: float
    rejected: float

    @property
    def balance(self) -> float:
        """The mean of what is right of both kinds of pixels."""
        return (self.right + self.rejected) / 2


def _counts() -> Tensor:
    return torch.zeros(BINS + 1, dtype=torch.int64)


@dataclass
class ScoreCounts:
    """Pixels by their best class's score, in steps of a hundredth.

    Attributes:
        right: of a named class, labelled so.
        wrong: of a named class, labelled otherwise.
        strange: of a class that is left out.
    """

    right: Tensor = field(default_factory=_counts)
    wrong: Tensor = field(default_factory=_counts)
    strange: Tensor = field(default_factory=_counts)

    def add(self, answer: Segmentation, truth: Tensor, kept: Sequence[int], ignore_label: int) -> None:
        """Count a picture.

        Args:
            answer: with the classes `kept`, and without `min_score`.
            truth: indices of all classes `[H, W]`, or `ignore_label`.
            kept: the index of each of the answer's classes among all.
            ignore_label: where no class is right.
        """
        truth = class_indices(truth, max(ignore_label, int(truth.max())) + 1, name="truth")
        labels = torch.tensor(kept)[answer.labels.long()]
        bins = (answer.scores * BINS).long().clamp(0, BINS)
        counted = truth != ignore_label
        named = torch.isin(truth, torch.tensor(kept)) & counted
        for counts, pixels in (
            (self.right, named & (labels == truth)),
            (self.wrong, named & (labels != truth)),
            (self.strange, counted & ~named),
        ):
            counts += torch.bincount(bins[pixels], minlength=BINS + 1)

    def effect(self, min_score: float) -> Effect:
        """Return the effect of a threshold in whole hundredths."""
        first = round(min_score * BINS)
        named = max(1, int(self.right.sum() + self.wrong.sum()))
        kept = (int(self.right[first:].sum()), int(self.wrong[first:].sum()))
        dropped = int(self.right[:first].sum() + self.wrong[:first].sum())
        rejected = int(self.strange[:first].sum()) / max(1, int(self.strange.sum()))
        return Effect(min_score, kept[0] / named, kept[1] / named, dropped / named, rejected)

    def best(self) -> Effect:
        """The threshold of the best balance."""
        return max((self.effect(step / BINS) for step in range(BINS + 1)), key=lambda effect: effect.balance)


def count_scores(
    segment: Callable[[Tensor, list[str]], Segmentation],
    entries: Iterable[dict[str, Any]],
    classes: Sequence[str],
    ignore_label: int,
    parts: int = 2,
) -> ScoreCounts:
    """Segment pictures with each part of the classes left out in turn, and count.

    Args:
        segment: labels a picture `[3, H, W]` with some of the classes.
        entries: of a `catseg_fast.data.folder.FolderDataset`.
        classes: all classes.
        ignore_label: where no class is right.
        parts: into how many parts the classes are divided, every `parts`-th into one.

    Raises:
        InputError: if there are fewer classes than parts, or fewer than two parts.
    """
    if not 2 <= parts <= len(classes):
        raise InputError(f"parts: expected 2 to {len(classes)}, the number of classes, got {parts}")
    counts = ScoreCounts()
    for entry in entries:
        for part in range(parts):
            kept = [index for index in range(len(classes)) if index % parts != part]
            answer = segment(entry["image"], [classes[index] for index in kept])
            counts.add(answer, entry["sem_seg"], kept, ignore_label)
    return counts
