"""The segmentation of one picture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from catseg_fast.errors import InputError
from catseg_fast.inference.readout import LabelMap, Readout, TopClasses
from catseg_fast.labels import NONE, check_min_score
from catseg_fast.text.fold import Fold


@dataclass(frozen=True)
class Segmentation:
    """The answer for one picture.

    Attributes:
        labels: index into `classes` of each pixel's best class, int32 `[H, W]`, on the CPU; -1 where that
            class's probability is below `min_score`.
        scores: the best class's probability, float32 `[H, W]`, on the CPU, whatever `min_score`.
        classes: the class names; of a fold, those of its classes.
        top_labels, top_scores: the best k classes and their probabilities, best first, `[k, H, W]`, where
            they were asked for.
        logits: the crops' logits `[B, T, h, w]` on the CPU, where they were asked for: `score_map` reads
            them.
        readout: how the crops make up the picture, with `logits`.
        fold: the classes' names, where a class has several.
        min_score: the probability below which a pixel, or an entry of `top_labels`, has the label -1.
    """

    labels: Tensor
    scores: Tensor
    classes: tuple[str, ...]
    top_labels: Tensor | None = None
    top_scores: Tensor | None = None
    logits: Tensor | None = None
    readout: Readout | None = None
    fold: Fold | None = None
    min_score: float | None = None

    @classmethod
    def of(
        cls,
        target: LabelMap | TopClasses,
        names: tuple[str, ...],
        readout: Readout,
        logits: Tensor | None = None,
        fold: Fold | None = None,
    ) -> Segmentation:
        """The answer that was read out into a target.

        Args:
            target: a label map of names, or the best classes.
            names: what the model has told apart.
            readout: how the crops make up the picture.
            logits: of the names.
            fold: of the names into classes.
        """
        labels, scores = target.labels.cpu(), target.scores.cpu()
        kept, classes = None if logits is None else readout, names if fold is None else fold.classes
        if isinstance(target, TopClasses):
            return cls(labels[0], scores[0], classes, labels, scores, logits, kept, fold)
        if fold is not None:
            labels = torch.tensor(fold.owners, dtype=torch.int32)[labels]
        return cls(labels, scores, classes, logits=logits, readout=kept, fold=fold)

    def with_min_score(self, min_score: float | None) -> Segmentation:
        """Return the same with the label -1 where the probability is below `min_score`; itself for None.

        Raises:
            InputError: if it is not in 0..1, or below the one by which labels were dropped before.
        """
        if min_score is None:
            return self
        if check_min_score(min_score) < (self.min_score or 0):
            raise InputError(
                f"min_score: {min_score} is below {self.min_score}, by which labels were dropped before; "
                "segment with the lowest one first"
            )
        labels = self.labels.masked_fill(self.scores < min_score, NONE)
        top = self.top_labels
        if top is not None and self.top_scores is not None:
            top = top.masked_fill(self.top_scores < min_score, NONE)
        return replace(self, labels=labels, top_labels=top, min_score=min_score)

    def score_map(self, label: int | str) -> Tensor:
        """The probability of one class, by index or name, at each pixel: float32 `[H, W]`.

        Of a class with several names, it is the largest of theirs.

        Raises:
            ValueError: if there is no such class, or the logits were not kept.
        """
        if self.logits is None or self.readout is None:
            raise ValueError("score_map: the logits were not kept; segment with keep_logits=True")
        if isinstance(label, str):
            if label not in self.classes:
                raise ValueError(f"label: {label!r} is not one of the {len(self.classes)} classes")
            label = self.classes.index(label)
        if not 0 <= label < len(self.classes):
            raise ValueError(f"label: {label} is not in 0..{len(self.classes) - 1}")
        names = slice(label, label + 1) if self.fold is None else self.fold.names_of(label)
        return self.readout(self.logits[:, names]).amax(dim=0)
