"""The window-attention block in plain torch ops, in any floating type; `op.py` has the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.kernels.attention import VECTOR, attend

MASKED = -100.0  # added to the score of a token of another region, as upstream does


def window_block(
    x: Tensor,
    query_key: Tensor,
    qkv: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    resolution: Sequence[int],
    window: int,
    shift: int,
    heads: int,
) -> Tensor:
    """Compute `op.window_block` with the order and masks of windows at a resolution."""
    weights = (qkv, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias)
    order = window_order(resolution, window, shift, x.device)
    masks = window_masks(resolution, window, shift, x.dtype, x.device)
    return ordered_block(x, query_key, weights, order, order.argsort(), masks, heads)


def ordered_block(
    x: Tensor,
    query_key: Tensor,
    weights: Sequence[Tensor],
    order: Tensor,
    inverse: Tensor,
    masks: Sequence[Tensor | None],
    heads: int,
) -> Tensor:
    """Compute the block with a given order and masks.

    Args:
        x: `[B, t, HW, C]`.
        query_key: `[B or 1, HW or 1, 2C]`.
        weights: weights of `window_block`.
        order: the position of each token in window order, `[HW]`.
        inverse: the inverse permutation, `[HW]`.
        masks: the mask `[N, N]` of each window, or None for a window without a mask.
        heads: attention heads.
    """
    qkv_weight, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias = weights
    (B, t, HW, C), windows = x.shape, len(masks)
    qkv = F.linear(normalise(x).index_select(2, order), qkv_weight)  # B, t, HW, 3C
    if query_key.shape[1] > 1:
        query_key = query_key.index_select(1, order)
    qkv[..., : 2 * C] += query_key[:, None]
    qkv = qkv.view(B * t, windows, HW // windows, 3, heads, -1)
    if all(mask is None for mask in masks):
        attended = _attend(qkv.flatten(0, 1), None)
    else:
        attended = torch.stack([_attend(qkv[:, w], mask) for w, mask in enumerate(masks)], dim=1)
    attended = attended.view(B, t, HW, C)
    x = x + F.linear(attended, proj, proj_bias).index_select(2, inverse)
    hidden = F.gelu(F.linear(normalise(x), fc1, fc1_bias))
    return x + F.linear(hidden, fc2, fc2_bias)


def window_order(resolution: Sequence[int], window: int, shift: int, device: torch.device) -> Tensor:
    """Return the position of each token `[HW]` when the windows of the shifted image are concatenated."""
    H, W = resolution
    positions = torch.arange(H * W, device=device).view(H, W).roll((-shift, -shift), dims=(0, 1))
    return _in_windows(positions, window).flatten()


def window_masks(
    resolution: Sequence[int], window: int, shift: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, ...]:
    """Return each window's mask `[N, N]`: 0 within a region of the image, else `MASKED`; or None.

    After the cyclic shift, the last windows of a row or column hold tokens from opposite borders, which must
    not attend to each other; the other windows have no mask.
    """
    H, W = resolution
    down, across = H // window, W // window
    if not shift:
        return (None,) * (down * across)
    rows, columns = (
        (place >= len(place) - window).int() + (place >= len(place) - shift).int()
        for place in (torch.arange(size, device=device) for size in (H, W))
    )
    regions = _in_windows(rows[:, None] * 3 + columns[None, :], window)  # windows, N
    masks = (regions[:, :, None] != regions[:, None, :]).to(dtype) * MASKED
    return tuple(
        mask if w // across == down - 1 or w % across == across - 1 else None for w, mask in enumerate(masks)
    )


def normalise(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters."""
    return F.layer_norm(x, x.shape[-1:])


def _in_windows(x: Tensor, window: int) -> Tensor:
    """Cut `[H, W]` into windows `[windows, N]`, row by row."""
    return x.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)


def _attend(qkv: Tensor, mask: Tensor | None) -> Tensor:
    """Attend within windows `qkv [n, N, 3, heads, d]`, whose queries include the scale: `[n, N, C]`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = attend(q, k, v, mask, scale=1.0, many=q.shape[-2] >= VECTOR)
    return attended.transpose(1, 2).flatten(2)
