"""Sums over the parts of a picture or video: each class's pixels and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catseg_fast.labels import NONE, NONE_NAME


class Totals:
    """Adds up label maps; `summary` is that of `catseg_fast.output.results.summarise` for all together.

    Args:
        classes: the class names.
        with_none: whether the summary has an entry of the pixels that no class fits.
    """

    def __init__(self, classes: Sequence[str], with_none: bool = False) -> None:
        self.classes, self.with_none = tuple(classes), with_none
        self.pixels = torch.zeros(len(self.classes) + 1, dtype=torch.int64)  # the first is of the label -1
        self.scores = torch.zeros(len(self.classes) + 1, dtype=torch.float64)

    def add(self, labels: Tensor, scores: Tensor) -> None:
        """Add labels and scores of one shape; the label -1 belongs to no class."""
        places, count = labels.flatten().long() + 1, len(self.classes) + 1
        self.pixels += torch.bincount(places, minlength=count)
        self.scores += torch.bincount(places, scores.flatten().double(), minlength=count)

    def include(self, other: Totals) -> None:
        """Add the sums of other parts, of the same classes."""
        self.pixels += other.pixels
        self.scores += other.scores

    def state(self) -> dict[str, Any]:
        """The sums, as JSON can hold them: of the classes that occur."""
        places = self.pixels.nonzero().flatten()
        columns = {"places": places, "pixels": self.pixels[places], "scores": self.scores[places]}
        return {name: column.tolist() for name, column in columns.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the sums over from a `state` of the same classes."""
        self.pixels.zero_()
        self.scores.zero_()
        places = torch.tensor(state["places"], dtype=torch.int64)
        self.pixels[places] = torch.tensor(state["pixels"], dtype=torch.int64)
        self.scores[places] = torch.tensor(state["scores"], dtype=torch.float64)

    def summary(self, present: float = 0.0) -> list[dict[str, Any]]:
        """Each class's index, name, share of the pixels and mean score there (None without pixels).

        Args:
            present: least share of a class that is listed.
        """
        total = max(1, int(self.pixels.sum()))
        rows = list(zip((NONE_NAME, *self.classes), self.pixels.tolist(), self.scores.tolist(), strict=True))
        entries: list[dict[str, Any]] = [
            {
                "index": index,
                "name": name,
                "share": pixels / total,
                "mean_score": score / pixels if pixels else None,
            }
            for index, (name, pixels, score) in enumerate(rows, NONE)
        ]
        listed = [entry for entry in entries[1:] if entry["share"] >= present]
        return listed + entries[:1] * self.with_none
