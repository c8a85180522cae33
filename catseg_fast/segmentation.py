"""What `CATSeg` takes and gives for one picture: its encoded form, and its segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from catseg_fast.label_map import LabelMap, Readout, TopClasses


@dataclass(frozen=True)
class EncodedImage:
    """What the model knows of a picture before it knows the classes; from `CATSeg.encode`.

    Attributes:
        features: dense CLIP features of the picture's B crops, `[B, 1 + h*w, C]`, on the model's device.
        guidance: the three guidance maps `[B, C, H, W]`, from coarse to fine.
        readout: how the crops make up the picture.
        dtype: type of the weights at that time; under autocast the features have another one.
    """

    features: Tensor
    guidance: tuple[Tensor, ...]
    readout: Readout
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return sum(x.nbytes for x in (self.features, *self.guidance))

    def check(self, like: Tensor, sliding_window: bool | None) -> None:
        """Check that it fits a model with the weight `like` and a call with `sliding_window`.

        Raises:
            ValueError: if it does not; the message has both.
        """
        if (self.features.device, self.dtype) != (like.device, like.dtype):
            raise ValueError(
                f"image: it was encoded on {self.features.device} in {self.dtype}, "
                f"and the model is on {like.device} in {like.dtype}"
            )
        sliding = self.readout.window is not None
        if sliding_window is not None and sliding_window != sliding:
            raise ValueError(f"sliding_window: {sliding_window}, and the image was encoded with {sliding}")


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


def split_encoded(
    features: Tensor,
    guidance: Sequence[Tensor],
    readouts: Sequence[Readout],
    crops: Sequence[int],
    dtype: torch.dtype,
) -> list[EncodedImage]:
    """Pictures that were encoded in one call, `crops` each, by weights of type `dtype`."""
    sizes = list(crops)
    maps = zip(*(x.split(sizes) for x in guidance), strict=True)
    parts = zip(features.split(sizes), maps, readouts, strict=True)
    return [EncodedImage(*part, dtype=dtype) for part in parts]
