"""Checks of an aggregator's sizes, and of the shapes of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from catseg_fast.errors import InputError
from catseg_fast.reference.window_attention import fit_window


def check_sizes(
    hidden_dim: int,
    nheads: int,
    decoder_dims: Sequence[int],
    pooling_size: tuple[int, int] | None,
    feature_resolution: tuple[int, int],
    window_size: int,
) -> None:
    """Raise an InputError that names the constructor's argument where sizes do not fit each other."""
    for name, sizes in (
        ("hidden_dim", (hidden_dim,)), ("nheads", (nheads,)), ("window_size", (window_size,)),
        ("pooling_size", pooling_size or (1, 1)), ("feature_resolution", feature_resolution),
    ):  # fmt: skip
        if min(sizes) < 1:
            raise InputError(f"{name}: {sizes[0] if len(sizes) == 1 else tuple(sizes)} is not positive")
    if hidden_dim % nheads:
        raise InputError(f"hidden_dim: {hidden_dim} is not divisible by nheads {nheads}")
    if min(decoder_dims) < 16:
        raise InputError(
            f"decoder_dims: {tuple(decoder_dims)}; groups are normalised, of 16 channels at least"
        )
    window, _ = fit_window(feature_resolution, window_size, 0)
    if feature_resolution[0] % window or feature_resolution[1] % window:
        raise InputError(
            f"feature_resolution: {tuple(feature_resolution)} is not divisible by the window {window}"
        )


def check_pooling(pooling: Sequence[int] | None, resolution: Sequence[int]) -> None:
    """Raise an InputError where the pooling before the class attention is larger than the map."""
    if pooling is not None and (pooling[0] > resolution[0] or pooling[1] > resolution[1]):
        raise InputError(
            f"img_feats: resolution {resolution[0]}x{resolution[1]} is smaller than the pooling "
            f"{pooling[0]}x{pooling[1]} before the class attention (pooling_size)"
        )


def _check_guidance(aggregator: Any, img_feats: Tensor, appearance_guidance: Sequence[Tensor | None]) -> None:
    projections = [aggregator.guidance_projection, *(aggregator.decoder_guidance_projection or ())]
    if len(appearance_guidance) < len(projections):
        raise InputError(
            f"appearance_guidance: expected {len(projections)} maps, got {len(appearance_guidance)}"
        )
    B, _, H, W = img_feats.shape
    for index, (projection, found) in enumerate(zip(projections, appearance_guidance, strict=False)):
        if projection is None:
            continue
        expected = (B, projection[0].in_channels, H * 2**index, W * 2**index)
        if found is None or tuple(found.shape) != expected:
            shape = None if found is None else tuple(found.shape)
            raise InputError(
                f"appearance_guidance[{index}]: expected shape {expected} beside img_feats "
                f"{tuple(img_feats.shape)}, got {shape}"
            )


def check_shapes(
    aggregator: Any,
    img_feats: Tensor,
    text_feats: Tensor,
    appearance_guidance: Sequence[Tensor | None],
) -> None:
    """Raise an InputError that names the argument and both shapes where the inputs do not fit."""
    if img_feats.ndim != 4:
        raise InputError(f"img_feats: shape {tuple(img_feats.shape)} is not [B, C, H, W]")
    if text_feats.ndim != 4:
        raise InputError(f"text_feats: shape {tuple(text_feats.shape)} is not [B, T, P, C]")
    shapes = f"img_feats {tuple(img_feats.shape)}, text_feats {tuple(text_feats.shape)}"
    if text_feats.shape[1] == 0:
        raise InputError(f"text_feats: no class ({shapes})")
    if img_feats.shape[0] != text_feats.shape[0]:
        raise InputError(f"text_feats: its batch size is not that of img_feats ({shapes})")
    if img_feats.shape[1] != text_feats.shape[3]:
        raise InputError(f"text_feats: its channels are not those of img_feats ({shapes})")
    if text_feats.shape[2] != aggregator.conv1.in_channels:
        prompts = aggregator.conv1.in_channels
        raise InputError(
            f"text_feats: {text_feats.shape[2]} prompts where the weights have {prompts} ({shapes})"
        )
    _check_guidance(aggregator, img_feats, appearance_guidance)
