"""Inputs of the benchmarks: published variants' aggregators with random weights, and random features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from catseg_fast import VARIANTS, Aggregator
from catseg_fast.text.prompts import PROMPT_ENSEMBLES

BENCHED_VARIANTS = ("v1-vitl-swinb", "v2-vitl", "v2-vitb")
CLASSES = (20, 150, 256, 459, 847, 1203, 4096)
CROPS = 5  # 4 windows and the whole picture
SELECTED = 256  # classes per crop that upstream's v2 aggregates

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """An aggregator's call.

    Attributes:
        variant: name of a published variant.
        classes: classes T.
        crops: crops B; 5 are the sliding window's.
        dtype: what our back ends compute in.
        max_classes: classes that are aggregated per crop; None for all.
    """

    variant: str
    classes: int
    crops: int = 1
    dtype: torch.dtype = torch.float32
    max_classes: int | None = None

    @property
    def aggregated(self) -> int:
        """Number of classes that are aggregated per crop."""
        return min(self.classes, self.max_classes or self.classes)

    @property
    def selects(self) -> bool:
        """True if classes are dropped."""
        return self.aggregated < self.classes

    def __str__(self) -> str:
        text = f"{self.variant}, T={self.classes}, B={self.crops}"
        if self.dtype != torch.float32:
            text += f", {DTYPES[self.dtype]}"
        return text if self.max_classes is None else f"{text}, best {self.max_classes}"


@dataclass(frozen=True)
class Call:
    """The aggregator of a case, and its arguments."""

    aggregator: Aggregator
    img_feats: Tensor
    text_feats: Tensor
    guidance: list[Tensor]

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.aggregator(self.img_feats, self.text_feats, self.guidance)

    def to(self, dtype: torch.dtype) -> Call:
        """Convert weights (in place) and inputs to another type."""
        text_feats = self.text_feats[:1].to(dtype).expand(len(self.img_feats), -1, -1, -1)
        guidance = [x.to(dtype) for x in self.guidance]
        return Call(self.aggregator.to(dtype), self.img_feats.to(dtype), text_feats, guidance)


def make_call(case: Case, device: torch.device | str = "cpu") -> Call:
    """Return weights and inputs of a case in fp32, made on the device; the same every time."""
    variant = VARIANTS[case.variant]
    prompts = PROMPT_ENSEMBLES[variant.prompt_ensemble]
    torch.manual_seed(0)
    with torch.device(device):
        aggregator = Aggregator(**variant.aggregator_arguments(prompts)).eval()
        H, W = variant.feature_resolution
        channels = (variant.appearance_guidance_dim, *variant.decoder_guidance_dims)
        width = variant.clip.embed_dim
        text = torch.randn(1, case.classes, prompts, width)
        call = Call(
            aggregator,
            torch.randn(case.crops, width, H, W),
            text.expand(case.crops, -1, -1, -1),
            [torch.randn(case.crops, c, k * H, k * W) for c, k in zip(channels, (1, 2, 4), strict=True)],
        )
    aggregator.max_classes = case.max_classes
    aggregator.engine.precision = case.dtype
    aggregator.engine.graphs = "off"  # recorded calls are a baseline of their own
    return call


def aggregator_cases(full: bool) -> list[Case]:
    """Return the cases of the aggregator: the published sizes, or those that a CPU computes in seconds."""
    if not full:
        small = [Case(variant, 4) for variant in ("v1-vitl-swinb", "v2-vitl")]
        return [*small, Case("v2-vitl", 4, dtype=torch.bfloat16), Case("v2-vitb", 8, max_classes=4)]
    cases = [
        Case(variant, classes, CROPS, dtype)
        for variant in BENCHED_VARIANTS
        for classes in CLASSES
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    return cases + [
        Case(case.variant, case.classes, CROPS, case.dtype, SELECTED)
        for case in cases
        if case.classes > SELECTED
    ]


def scaling_cases(full: bool, gpu: bool) -> list[Case]:
    """Return one variant with more and more classes, all aggregated: in fp32, and on a GPU also in bf16.

    A CPU has one crop, and no more classes than the reference in float64 has memory for.
    """
    if not gpu:
        return [Case("v2-vitl", classes) for classes in (CLASSES[:-1] if full else (4, 20, 60))]
    dtypes = (torch.bfloat16, torch.float32)
    return [Case("v2-vitl", classes, CROPS, dtype) for classes in CLASSES for dtype in dtypes]
