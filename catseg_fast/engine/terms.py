"""Inputs of the stages besides weights and the chunk, computed once per image or once per vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catseg_fast.engine.folding import DecoderStage, Plan, WindowBlock, wide
from catseg_fast.engine.kept import kept
from catseg_fast.errors import InputError
from catseg_fast.kernels.window_attention.plain import window_masks, window_order
from catseg_fast.reference.shapes import check_pooling
from catseg_fast.reference.window_attention import fit_window

Geometry = tuple[Tensor, Tensor, tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class BlockGuidance:
    """The appearance guidance of a window block, and the layout of its windows."""

    resolution: tuple[int, int]
    window: int  # at most the resolution
    shift: int
    order: Tensor  # [HW]: the position of each token when the windows are concatenated
    inverse: Tensor  # [HW]: the inverse permutation
    masks: tuple[Tensor | None, ...]  # [N, N] of each window; None for a window without a mask
    query_key: Tensor  # [B or 1, HW or 1, 2C], added to queries and keys

    def of(self, crops: slice) -> BlockGuidance:
        """Return the guidance of some crops."""
        query_key = self.query_key if len(self.query_key) == 1 else self.query_key[crops]
        return replace(self, query_key=query_key)


UNIT_BYTES = 2**26  # largest size of unit text features that are kept besides the features


@dataclass(frozen=True)
class ImageTerms:
    """The terms of B crops that do not depend on the class."""

    resolution: tuple[int, int]
    features: Tensor  # [B, HW, F], unit vectors
    blocks: tuple[tuple[BlockGuidance, BlockGuidance], ...]  # by layer
    decoder: tuple[Tensor, Tensor]  # [B or 1, out, 2H, 2W]: the first convolution of guidance, and biases

    @property
    def crops(self) -> int:
        """Crops B."""
        return len(self.features)

    def of(self, crops: slice) -> ImageTerms:
        """Return the terms of some crops."""
        if crops == slice(0, self.crops):
            return self
        return ImageTerms(
            self.resolution,
            self.features[crops],
            tuple((first.of(crops), second.of(crops)) for first, second in self.blocks),
            tuple(x if len(x) == 1 else x[crops] for x in self.decoder),  # type: ignore[arg-type]
        )


@dataclass(frozen=True, eq=False)
class VocabularyTerms:
    """The terms of T classes that do not depend on the image; a leading 1 means the same for all crops.

    The features are copied and cast only if they are small, so that a large vocabulary is stored once.
    """

    features: Tensor  # [B or 1, T, P, F]
    inverse_norm: Tensor  # [B or 1, T, P]
    unit: Tensor | None  # [B or 1, T, P, F], unit vectors in the stages' type; None if they are large
    queries: tuple[Tensor | None, ...]  # by layer: [B or 1, T, C]
    keys: tuple[Tensor | None, ...]

    @property
    def classes(self) -> int:
        """Classes T."""
        return self.features.shape[1]


def image_terms(
    aggregator: Any, plan: Plan, img_feats: Tensor, appearance_guidance: Sequence[Tensor | None]
) -> ImageTerms:
    """Return the terms of `img_feats [B, F, H, W]` with upstream's three guidance maps, coarse to fine."""
    dtype = plan.embed.dtype
    resolution = (img_feats.shape[2], img_feats.shape[3])
    features = F.normalize(wide(img_feats), dim=1).flatten(2).transpose(1, 2)

    guidance = _apply(aggregator.guidance_projection, appearance_guidance[:1])[0]
    decoder_guidance: Sequence[Tensor | None] = (None, None)
    if aggregator.decoder_guidance_projection is not None:
        decoder_guidance = [
            _apply(project, [guidance_map])[0]
            for project, guidance_map in zip(
                aggregator.decoder_guidance_projection, appearance_guidance[1:], strict=True
            )
        ]
    by_eps: dict[float, Tensor | None] = dict.fromkeys(layer.guidance_eps for layer in plan.layers)
    if guidance is not None:
        tokens = guidance.flatten(2).transpose(1, 2)
        for eps in by_eps:
            by_eps[eps] = F.layer_norm(wide(tokens), tokens.shape[-1:], eps=eps).to(dtype)
    blocks = []
    for layer in plan.layers:
        normalised = by_eps[layer.guidance_eps]
        first, second = (
            block_guidance(block, normalised, resolution, img_feats.device) for block in layer.blocks
        )
        blocks.append((first, second))
    for layer in plan.layers:
        check_pooling(layer.classes.pooling, resolution)
    H, W = resolution
    decoder = (
        decoder_guidance_maps(plan.decoder[0], decoder_guidance[0], (2 * H, 2 * W)),
        decoder_guidance_maps(plan.decoder[1], decoder_guidance[1], (4 * H, 4 * W)),
    )
    return ImageTerms(resolution, features.to(dtype), tuple(blocks), decoder)


def vocabulary_terms(
    aggregator: Any, plan: Plan, text_feats: Tensor, normalise_prompts: bool
) -> VocabularyTerms:
    """Return the terms of `text_feats [B or 1, T, P, F]`.

    Args:
        normalise_prompts: whether the text guidance is a mean over prompts of unit vectors, as in upstream's
            selection of classes only.
    """
    if text_feats.shape[0] > 1 and text_feats.stride(0) == 0:
        text_feats = text_feats[:1]
    dtype = torch.promote_types(text_feats.dtype, torch.float32)
    inverse_norm = 1 / text_feats.norm(dim=-1, dtype=dtype).clamp_min(1e-12)
    queries: list[Tensor | None] = [None] * len(plan.layers)
    keys = list(queries)
    if aggregator.text_guidance_projection is not None:
        weight = inverse_norm if normalise_prompts else torch.ones_like(inverse_norm)
        mean = torch.einsum("btpf,btp->btf", wide(text_feats), weight)
        projected = _apply(aggregator.text_guidance_projection, [F.normalize(mean, dim=-1, eps=0)])[0]
        assert projected is not None
        for index, layer in enumerate(plan.layers):
            if layer.classes.text is not None:
                both = F.linear(projected.to(plan.embed.dtype), layer.classes.text)
                # In memory of their own, as inputs of launches that are prepared together.
                queries[index], keys[index] = (x.contiguous() for x in both.chunk(2, dim=-1))
    unit = None
    small = text_feats.numel() * plan.embed.itemsize <= UNIT_BYTES
    if small and not text_feats.requires_grad and not torch.compiler.is_compiling():
        unit = chunk_text(text_feats, inverse_norm, plan.embed.dtype)
    return VocabularyTerms(text_feats, inverse_norm, unit, tuple(queries), tuple(keys))


def block_guidance(
    block: WindowBlock, tokens: Tensor | None, resolution: tuple[int, int], device: torch.device
) -> BlockGuidance:
    """Return a block's share of guidance tokens `[B or 1, HW, G]`, normalised without affine part."""
    H, W = resolution
    window, shift = fit_window(resolution, block.window, block.shift)
    if H % window or W % window:
        raise InputError(f"img_feats: resolution {H}x{W} is not divisible by the window {window}")
    order, inverse, masks = _geometry(resolution, window, shift, block.qkv.dtype, device)
    query_key = block.guidance_bias.view(1, 1, -1)
    if block.guidance is not None and tokens is not None:
        query_key = F.linear(tokens, block.guidance, block.guidance_bias)
    return BlockGuidance(resolution, window, shift, order, inverse, masks, query_key)


class _Sizes:
    """Owner of cached values that depend only on sizes."""


_SIZES = _Sizes()


def _geometry(
    resolution: tuple[int, int], window: int, shift: int, dtype: torch.dtype, device: torch.device
) -> Geometry:
    """Return order, inverse order and masks of windows, which do not depend on weights or pictures."""

    def make() -> Geometry:
        order = window_order(resolution, window, shift, device)
        return order, order.argsort(), window_masks(resolution, window, shift, dtype, device)

    return kept(_SIZES, (resolution, window, shift, dtype, device), device, make)


def decoder_guidance_maps(stage: DecoderStage, guidance: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Return the part of a stage's first convolution that is the same for every class."""
    fixed = kept(stage, size, stage.bias.device, lambda: _spread(stage.bias, size))
    if stage.guidance is not None and guidance is not None:
        fixed = fixed + F.conv2d(guidance.to(stage.guidance.dtype), stage.guidance, padding=1)
    return fixed.contiguous(memory_format=torch.channels_last)


def _spread(bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Expand a bias `[1, out, 3, 3]` to a map `[1, out, H, W]` of at least 2x2."""
    for axis, side in enumerate(size, 2):
        first, inside, last = bias.split(1, dim=axis)
        shape = list(inside.shape)
        shape[axis] = side - 2
        bias = torch.cat([first, inside.expand(shape), last], dim=axis)
    return bias.contiguous(memory_format=torch.channels_last)


def _apply(module: nn.Module | None, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the module's outputs for inputs cast to its weights' type; None if it or the input is None."""
    if module is None:
        return [None for _ in inputs]
    dtype = next(module.parameters()).dtype
    return [None if x is None else module(x.to(dtype)) for x in inputs]


def chunk_text(features: Tensor, inverse_norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the unit text features of a chunk, `[B or 1, t, P, F]`, in the stages' type."""
    return (features * inverse_norm[..., None]).to(dtype)
