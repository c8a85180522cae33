"""What the benchmarks run on: aggregators of published variants with random weights, and random features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from catseg_fast import VARIANTS, Aggregator
from catseg_fast.vocabulary import PROMPT_ENSEMBLES


@dataclass(frozen=True)
class Case:
    """An aggregator's call.

    Attributes:
        variant: name of a published variant.
        classes: classes T.
        crops: crops B; 5 are the sliding window's.
    """

    variant: str
    classes: int
    crops: int = 1

    def __str__(self) -> str:
        return f"{self.variant}, T={self.classes}, B={self.crops}"


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


def make_call(case: Case) -> Call:
    """Weights and inputs of a case, the same every time."""
    variant = VARIANTS[case.variant]
    prompts = len(PROMPT_ENSEMBLES[variant.prompt_ensemble])
    torch.manual_seed(0)
    aggregator = Aggregator(**variant.aggregator_arguments(prompts)).eval()
    H, W = variant.feature_resolution
    channels = (variant.appearance_guidance_dim, *variant.decoder_guidance_dims)
    width = variant.clip.embed_dim
    text = torch.randn(1, case.classes, prompts, width)
    return Call(
        aggregator,
        torch.randn(case.crops, width, H, W),
        text.expand(case.crops, -1, -1, -1),
        [torch.randn(case.crops, c, k * H, k * W) for c, k in zip(channels, (1, 2, 4), strict=True)],
    )
