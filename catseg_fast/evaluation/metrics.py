"""Scores of label maps from exact counts per class, without a T x T confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from catseg_fast.errors import InputError
from catseg_fast.labels import NONE, class_indices


@dataclass(frozen=True)
class ClassCounts:
    """Pixels per class, int64 `[T]` each; pixels where no class is right do not count.

    Attributes:
        intersection: pixels rightly labelled as the class.
        truth: pixels of the class.
        predicted: pixels labelled as the class.
        unlabelled: pixels that count, of all classes, whose label is -1: none of the classes.
    """

    intersection: Tensor
    truth: Tensor
    predicted: Tensor
    unlabelled: int = field(default=0, kw_only=True)

    @classmethod
    def none(cls, classes: int) -> ClassCounts:
        """Return counts of no pixels."""
        return cls(*(torch.zeros(classes, dtype=torch.int64) for _ in range(3)))

    @classmethod
    def of(
        cls,
        labels: Tensor,
        truth: Tensor,
        classes: int,
        ignore_label: int,
        ignore_unlabelled: bool = False,
    ) -> ClassCounts:
        """Count a label map's pixels against the truth, both `[H, W]` of any integer type.

        Args:
            labels: class indices; -1 where none of the classes fits, which is a wrong answer.
            truth: class indices, or `ignore_label`.
            classes: number of classes.
            ignore_label: where no class is right.
            ignore_unlabelled: whether pixels with the label -1 are left out instead.

        Raises:
            InputTypeError: if one of them is not of integers.
            InputError: if the sizes differ, or a label of a pixel that counts is not in -1..classes - 1.
        """
        if labels.shape != truth.shape:
            raise InputError(
                f"labels: {list(labels.shape)} and their truth {list(truth.shape)} differ in size"
            )
        truth = class_indices(truth, classes, ignore_label, "truth")
        counted = truth != ignore_label
        labels, truth = class_indices(labels[counted], classes, NONE), truth[counted]
        right, labelled = labels[labels == truth], labels != NONE
        if ignore_unlabelled:
            truth = truth[labelled]
        parts = (right, truth, labels[labelled])
        intersection, truth, predicted = (torch.bincount(values, minlength=classes) for values in parts)
        return cls(intersection, truth, predicted, unlabelled=len(labels) - len(parts[2]))

    def __add__(self, other: ClassCounts) -> ClassCounts:
        return ClassCounts(
            self.intersection + other.intersection,
            self.truth + other.truth,
            self.predicted + other.predicted,
            unlabelled=self.unlabelled + other.unlabelled,
        )

    @property
    def iou(self) -> Tensor:
        """Return each class's intersection over union, float64 `[T]`; NaN where the union is empty."""
        return self.intersection.double() / (self.truth + self.predicted - self.intersection)

    @property
    def accuracy(self) -> Tensor:
        """Return the share of each class's pixels that are right, float64 `[T]`; NaN where it has none."""
        return self.intersection.double() / self.truth

    def scores(self) -> dict[str, float]:
        """Return the scores of detectron2's `SemSegEvaluator`, as shares of 1; NaN if no pixel counts.

        - `mIoU`: mean IoU of the classes in the truth, as in detectron2 since July 2022;
        - `mIoU_union`: mean IoU of the classes in the truth or among the labels, as in detectron2 0.6 and
          earlier: a class that is in no picture counts as 0 if a single pixel is labelled so;
        - `fwIoU`: IoU weighted by the classes' pixels;
        - `pACC`: share of the pixels that are right;
        - `mACC`: mean accuracy of the classes in the truth.
        """
        present, met = self.truth > 0, self.truth + self.predicted > 0
        iou, weights = self.iou[present], self.truth[present].double()
        return {
            "mIoU": iou.mean().item(),
            "mIoU_union": self.iou[met].mean().item(),
            "fwIoU": (iou * weights).sum().item() / weights.sum().item() if len(weights) else float("nan"),
            "pACC": (self.intersection.sum().double() / self.truth.sum()).item(),
            "mACC": self.accuracy[present].mean().item(),
        }
