"""The training recipe, by default upstream's, and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from catseg_fast.config import CROP_SIZE
from catseg_fast.errors import InputError
from catseg_fast.numeric import real, whole
from catseg_fast.reference.finetune import CLIP_FINETUNE

PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Recipe:
    """Settings that determine the result of a run, besides the data and the initial weights.

    Attributes:
        steps: optimiser steps.
        batch_size: pictures per step, over all processes.
        accumulate: parts in which each process works through its pictures of a step.
        lr: largest learning rate, of everything but CLIP and v1's backbone.
        warmup: steps in which the learning rate rises linearly to the cosine's value.
        clip_multiplier, backbone_multiplier: of the learning rate of CLIP and of v1's guidance backbone,
            which is not trained at 0.
        weight_decay: of everything but normalisations and embeddings.
        clip_grad: largest norm of the gradient of all parameters together; 0 for no limit.
        clip_finetune: trained part of CLIP, as in `CATSeg`.
        pooling: side of the class attention's average pooling; weights do not depend on it.
        crop_size: side of the pictures in pixels.
        min_sizes: lengths of which one is drawn for a picture's shorter side before it is cropped; by default
            only `crop_size`.
        category_max_ratio: a crop is drawn again if one class has a larger share of it.
        colour: whether brightness, contrast, saturation and hue are changed at random.
        classes_per_step: aggregate the classes that a step's pictures have and, up to this number, others
            drawn at random; None for all classes.
        fewest_classes: draw that number for each step, between this and `classes_per_step`; None for always
            `classes_per_step`. Scores of a model that was trained with one number fall with others.
        random_synonyms: draw one of a class's synonyms each step, where the model takes the first (v2).
        precision: "fp32", "fp16" or "bf16"; the last two by autocast.
        seed: seed of all random numbers.

    Raises:
        InputError: if a value makes no sense; the message names it.
    """

    steps: int = 80_000
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 0
    clip_multiplier: float = 0.01
    backbone_multiplier: float = 0.0
    weight_decay: float = 1e-4
    clip_grad: float = 0.01
    clip_finetune: str = "attention"
    pooling: int = 2
    crop_size: int = CROP_SIZE
    min_sizes: tuple[int, ...] = ()
    category_max_ratio: float = 1.0
    colour: bool = True
    classes_per_step: int | None = None
    fewest_classes: int | None = None
    random_synonyms: bool = False
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        given = vars(self).copy()
        checked: dict[str, Any] = {}  # as Python's own types, which checkpoints hold
        for name in ("steps", "batch_size", "accumulate", "pooling", "crop_size"):
            checked[name] = whole(given[name], name)
        for name in ("warmup", "seed"):
            checked[name] = whole(given[name], name, 0)
        if checked["seed"] >= 2**63:
            raise InputError(f"seed: {checked['seed']} is not below 2^63")
        for name in ("lr", "category_max_ratio"):
            checked[name] = real(given[name], name)
            if not 0 < checked[name] < math.inf:
                raise InputError(f"{name}: {checked[name]} is not positive")
        for name in ("clip_multiplier", "backbone_multiplier", "weight_decay", "clip_grad"):
            checked[name] = real(given[name], name)
            if not 0 <= checked[name] < math.inf:
                raise InputError(f"{name}: {checked[name]} is negative or not finite")
        checked["min_sizes"] = tuple(whole(size, "min_sizes") for size in self.min_sizes)
        if self.classes_per_step is not None:
            checked["classes_per_step"] = whole(self.classes_per_step, "classes_per_step")
        if self.fewest_classes is not None:
            fewest, most = whole(self.fewest_classes, "fewest_classes", None), checked.get("classes_per_step")
            if most is None or not 1 <= fewest <= most:
                raise InputError(f"fewest_classes: {fewest} is not between 1 and classes_per_step, {most}")
            checked["fewest_classes"] = fewest
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.warmup >= self.steps:
            raise InputError(f"warmup: {self.warmup} is not below the number of steps, {self.steps}")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"accumulate: {self.accumulate} does not divide the batch size, {self.batch_size}"
            )
        for name, known in (("precision", PRECISIONS), ("clip_finetune", CLIP_FINETUNE)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: half a cosine, under a linear warm-up."""
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.lr * cosine * min(1.0, (step + 1) / (self.warmup + 1))
