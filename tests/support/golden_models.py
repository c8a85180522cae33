"""Models and inputs of the golden cases (golden/GOLDEN.md)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from catseg_fast.config import CLIP_PIXEL_MEAN, VARIANTS, CLIPConfig, ResNetConfig, SwinConfig, Variant
from catseg_fast.reference.model import CATSeg
from support.golden_rule import GOLDEN, Meta, check_sha_weights, fill, load_meta

CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))

# Cases of many classes that have shorter ones of their kind: `…_T33_…`, and for the selection of classes
# `agg_v2_T300_B2_p22`.
LONG = ("agg_v1_T150_p11", "agg_v2_T150_p11", "agg_v2_T300_p11")


def parameters(names: Iterable[str], long: Collection[str] = LONG) -> list[ParameterSet]:
    """Return cases as parameters of a test, the long ones marked as slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in long else []) for name in names]


def cases(kind: str) -> list[str]:
    """Return the names of the cases of a kind: "module", "model" or "part"."""
    return [name for name, found in _kinds().items() if found == kind]


@cache
def _kinds() -> dict[str, str]:
    return {name: load_meta(name)["kind"] for name in CASES}


def clip_config(dims: dict[str, int]) -> CLIPConfig:
    """Return the CLIP model of a case from upstream's names of its sizes."""
    return CLIPConfig(
        embed_dim=dims["embed_dim"],
        image_size=dims["image_resolution"],
        input_size=384 if dims["vision_patch_size"] == 16 else 336,
        patch_size=dims["vision_patch_size"],
        vision_width=dims["vision_width"],
        vision_layers=dims["vision_layers"],
        vision_heads=dims["vision_width"] // 64,
        text_width=dims["transformer_width"],
        text_heads=dims["transformer_heads"],
        text_layers=dims["transformer_layers"],
    )


def variant_of(meta: Meta) -> Variant:
    """Return the variant of the model that a case was made with."""
    head, build = meta["cfg"], meta["build"]
    base = VARIANTS["v1-vitl-swinb" if meta["version"] == "v1" else "v2-vitl"]
    backbone = ResNetConfig(50) if build.get("backbone") == "r50" else SwinConfig(depths=(2, 2, 2))
    return replace(
        base,
        name=meta["case"],
        clip=clip_config(meta["clip_dims"]),
        appearance_guidance_dim=head["APPEARANCE_GUIDANCE_DIM"],
        decoder_guidance_dims=tuple(head["DECODER_GUIDANCE_DIMS"]),
        guidance_layers=(3, 7) if meta["clip_name"] == "ViT-B/16" else (7, 15),
        pooling_size=tuple(head["POOLING_SIZES"]),
        pad_len=build.get("pad_len", base.pad_len),
        backbone=backbone if meta["version"] == "v1" else None,
    )


def build_model(meta: Meta, model_type: type[CATSeg]) -> CATSeg:
    """Return the whole model of a case, with its weights."""
    model = model_type(
        variant_of(meta),
        meta["classes"],
        sliding_window=meta["build"].get("sliding_window", False),
        prompt_ensemble=meta["templates"],
    )
    fill(model, meta["prefix"], meta["seed"])
    check_sha_weights(model.state_dict(), meta)
    return model.eval()


def constructor_arguments(meta: Meta) -> dict[str, Any]:
    """Return the keyword arguments of the module that a case was made with."""
    arguments = dict(meta["kwargs"])
    if meta["version"] == "v1" and meta["cls"] in ("Aggregator", "ClassTransformerLayer"):
        arguments.setdefault("pad_len", 0)
    return arguments


def golden_image(meta: Meta, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the first image as the model's input.

    Upstream pads two images to a common size, which this package does not do. So the first image of that case
    is padded here like upstream's, with zeros after normalisation.
    """
    image = inputs["image0"]
    if meta["case"] == "model_v2_twoimages":
        height, width = (max(x.shape[axis] for x in inputs.values()) for axis in (1, 2))
        padded = torch.tensor(CLIP_PIXEL_MEAN).view(3, 1, 1).expand(3, height, width).clone()
        padded[:, : image.shape[1], : image.shape[2]] = image
        image = padded
    entry: dict[str, Any] = {"image": image}
    if meta["sizes"] is not None:
        entry["height"], entry["width"] = meta["sizes"][0]
    return entry
