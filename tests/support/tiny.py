"""Whole models that are small and fast, with weights by the golden rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from catseg_fast import CATSeg, Segmentation, Variant
from catseg_fast.config import CLIPConfig, SwinConfig, Version
from support.golden_rule import fill, make_input

CLASSES = ("wall", "building, edifice", "sky", "floor", "tree")

V2 = Variant(
    name="tiny-v2",
    version="v2",
    clip=CLIPConfig(
        embed_dim=32, image_size=224, input_size=384, patch_size=16,
        vision_width=64, vision_layers=3, vision_heads=2, text_width=32, text_heads=2, text_layers=2,
    ),
    backbone=None, appearance_guidance_dim=32, prompt_ensemble="single", decoder_guidance_dims=(24, 16),
    guidance_layers=(0, 1), hidden_dim=32, num_layers=2, pad_len=8, text_guidance_proj_dim=16,
    appearance_guidance_proj_dim=16, decoder_dims=(32, 16), decoder_guidance_proj_dims=(8, 4),
)  # fmt: skip

# Two prompts per class; the backbone's channels are 32, 64 and 128.
V1 = replace(
    V2, name="tiny-v1", version="v1", pad_len=0, prompt_ensemble="single",
    backbone=SwinConfig(embed_dim=32, depths=(1, 1, 2), num_heads=(1, 2, 4)),
    appearance_guidance_dim=128, decoder_guidance_dims=(64, 32),
)  # fmt: skip
TEMPLATES = ("a photo of a {}.", "a bad photo of the {}.")


def tiny_model(version: Version = "v2", classes: Sequence[str] | None = CLASSES, **kwargs: Any) -> CATSeg:
    """Return a model in evaluation mode; keyword arguments are the constructor's."""
    if version == "v1":
        kwargs.setdefault("prompt_ensemble", TEMPLATES)
    model = CATSeg(kwargs.pop("variant", V1 if version == "v1" else V2), classes, **kwargs)
    fill(model)
    return model.eval()


def picture(height: int, width: int, name: str = "picture") -> Tensor:
    """Return an RGB picture `[3, height, width]`, whole numbers in 0..255."""
    return make_input(f"tiny:{name}", "image", (3, height, width))


def sem_seg(model: CATSeg, image: Tensor, **size: int) -> Tensor:
    """Return the probabilities `[T, H, W]` of one image from the drop-in call."""
    (result,) = model([{"image": image, **size}])
    return result["sem_seg"]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Check whether probabilities agree up to rounding."""
    return actual.shape == expected.shape and bool(torch.allclose(actual, expected, rtol=0, atol=tolerance))


def agree(actual: Segmentation, every: Segmentation, tolerance: float = 1e-5) -> bool:
    """Check whether each pixel has its best classes, given the answer with the scores of `every` class.

    If the scores of two classes are equal up to rounding, the best one depends on the CPU.
    """
    assert every.top_labels is not None
    assert every.top_scores is not None
    maps = every.top_scores.gather(0, every.top_labels.argsort(dim=0))
    labels, scores = actual.labels[None], actual.scores[None]
    if actual.top_labels is not None and actual.top_scores is not None:
        if not torch.equal(actual.labels, actual.top_labels[0]):
            return False
        labels, scores = actual.top_labels, actual.top_scores
    best = every.top_scores[: len(labels)]
    if actual.classes != every.classes or not close(scores, best, tolerance):
        return False
    distinct = bool(labels.sort(dim=0).values.diff(dim=0).all())
    return distinct and close(maps.gather(0, labels.long()), best, tolerance)
