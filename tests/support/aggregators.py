"""A small aggregator of the reference and inputs for it, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from catseg_fast import reference
from catseg_fast.engine.folding import Plan, build_plan
from catseg_fast.engine.terms import ImageTerms, VocabularyTerms, image_terms, vocabulary_terms

B, T, H, W, WINDOW = 2, 5, 8, 12, 4  # six windows
PUBLISHED = {"feature_resolution": (24, 24), "window_size": 12}


def make_aggregator(**changes: Any) -> reference.Aggregator:
    """Return a small aggregator in float64 with weights that leave no term near zero."""
    arguments: dict[str, Any] = {
        "text_guidance_dim": 24, "text_guidance_proj_dim": 16, "appearance_guidance_dim": 20,
        "appearance_guidance_proj_dim": 16, "decoder_dims": (32, 16), "decoder_guidance_dims": (12, 10),
        "decoder_guidance_proj_dims": (16, 16), "num_layers": 2, "nheads": 2, "hidden_dim": 32,
        "pooling_size": (1, 1), "prompt_channel": 3, "pad_len": 9, "feature_resolution": (H, W),
        "window_size": WINDOW,
    }  # fmt: skip
    torch.manual_seed(0)
    aggregator = reference.Aggregator(**arguments | changes).double().eval()
    with torch.no_grad():
        for parameter in aggregator.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.abs().max() == 0:
                parameter.normal_()
    return aggregator


def features(
    aggregator: Any, classes: int = T, crops: int = B, resolution: tuple[int, int] = (H, W)
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return random image features, text features and guidance maps of some crops."""
    h, w = resolution
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    text = random(1, classes, aggregator.conv1.in_channels, 24).expand(crops, -1, -1, -1)
    return (
        random(crops, 24, h, w),
        text,
        [random(crops, c, k * h, k * w) for c, k in ((20, 1), (12, 2), (10, 4))],
    )


def terms(aggregator: Any) -> tuple[Plan, ImageTerms, VocabularyTerms]:
    """Return the folded weights of an aggregator, and what is computed per image and per vocabulary."""
    plan = build_plan(aggregator, torch.float64)
    image, text, guidance = features(aggregator)
    return (
        plan,
        image_terms(aggregator, plan, image, guidance),
        vocabulary_terms(aggregator, plan, text, normalise_prompts=False),
    )


def chunk(*shape: int) -> Tensor:
    """Return random numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
