"""Sums over the parts of a picture or video: each class's pixels and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Totals:
    """Adds up label maps; `summary` is that of `catseg_fast.output.results.summarise` for all together."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.pixels = torch.zeros(len(self.classes), dtype=torch.int64)
        self.scores = torch.zeros(len(self.classes), dtype=torch.float64)
        self.unlabelled = 0

    def add(self, labels: Tensor, scores: Tensor) -> None:
        """Add labels and scores of one shape; negative labels belong to no class."""
        labelled = labels >= 0
        indices, count = labels[labelled].long(), len(self.classes)
        self.pixels += torch.bincount(indices, minlength=count)
        self.scores += torch.bincount(indices, scores[labelled].double(), minlength=count)
        self.unlabelled += labels.numel() - len(indices)

    def state(self) -> dict[str, Any]:
        """The sums, as JSON can hold them."""
        pixels, scores = self.pixels.tolist(), self.scores.tolist()
        return {"pixels": pixels, "scores": scores, "unlabelled": self.unlabelled}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the sums over from a `state` of the same classes."""
        self.pixels = torch.tensor(state["pixels"], dtype=torch.int64)
        self.scores = torch.tensor(state["scores"], dtype=torch.float64)
        self.unlabelled = state["unlabelled"]

    def summary(self) -> list[dict[str, Any]]:
        """Each class's index, name, share of the pixels and mean score there (None without pixels)."""
        total = max(1, int(self.pixels.sum()) + self.unlabelled)
        rows = zip(self.classes, self.pixels.tolist(), self.scores.tolist(), strict=True)
        return [
            {
                "index": index,
                "name": name,
                "share": pixels / total,
                "mean_score": score / pixels if pixels else None,
            }
            for index, (name, pixels, score) in enumerate(rows)
        ]
