"""The segmentation of one picture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from catseg_fast.inference.readout import LabelMap, Readout, TopClasses


@dataclass(frozen=True)
class Segmentation:
    """The answer for one picture.

    Attributes:
        labels: index into `classes` of each pixel's best class, int32 `[H, W]`, on the CPU.
        scores: that class's probability, float32 `[H, W]`, on the CPU.
        classes: the class names.
        top_labels, top_scores: the best k classes and their probabilities, best first, `[k, H, W]`, where
            they were asked for.
        logits: the crops' logits `[B, T, h, w]` on the CPU, where they were asked for: `score_map` reads
            them.
        readout: how the crops make up the picture, with `logits`.
    """

    labels: Tensor
    scores: Tensor
    classes: tuple[str, ...]
    top_labels: Tensor | None = None
    top_scores: Tensor | None = None
    logits: Tensor | None = None
    readout: Readout | None = None

    @classmethod
    def of(
        cls,
        target: LabelMap | TopClasses,
        classes: tuple[str, ...],
        readout: Readout,
        logits: Tensor | None = None,
    ) -> Segmentation:
        """The answer that was read out into a target."""
        labels, scores = target.labels.cpu(), target.scores.cpu()
        kept = None if logits is None else readout
        if isinstance(target, LabelMap):
            return cls(labels, scores, classes, logits=logits, readout=kept)
        return cls(labels[0], scores[0], classes, labels, scores, logits, kept)

    def score_map(self, label: int | str) -> Tensor:
        """The probability of one class, by index or name, at each pixel: float32 `[H, W]`.

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
        return self.readout(self.logits[:, label : label + 1])[0]
