"""Bilinear interpolation of pooled tokens to all positions, with aligned corners, added to x.

A position (r, s) of the H x W grid is at (r (h - 1) / (H - 1), s (w - 1) / (W - 1)) of the pooled h x w grid;
out is x plus the four pooled tokens around that point, weighted by distance. x and out are `[B, t, HW, C]`,
pooled is `[B, t, hw, C]`; the interpolated tokens never reach memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig


@triton.jit(do_not_specialize=["classes"])
def unpool_kernel(
    x_ptr,  # [B, t, HW, C], strided over B, t and HW
    pooled_ptr,  # [B * t, hw, C]
    out_ptr,  # [B, t, HW, C], output, strided over B and t: x plus the interpolated pooled; it may be x
    classes,  # t
    x_stride_b,
    x_stride_t,
    x_stride_p,
    out_stride_b,
    out_stride_t,
    row_scale,  # pooled rows per row
    column_scale,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    POOLED_H: tl.constexpr = H // POOL_H
    POOLED_W: tl.constexpr = W // POOL_W
    parts: tl.constexpr = (H * W + POSITIONS - 1) // POSITIONS
    map_ = (tl.program_id(0) // parts).to(tl.int64)
    p = tl.program_id(0) % parts * POSITIONS + tl.arange(0, POSITIONS)
    o_c = tl.arange(0, BLOCK_C)
    m = (p < H * W)[:, None] & (o_c < C)[None, :]

    row, column = (p // W).to(tl.float32) * row_scale, (p % W).to(tl.float32) * column_scale
    top, left = tl.minimum(row.to(tl.int32), POOLED_H - 1), tl.minimum(column.to(tl.int32), POOLED_W - 1)
    bottom, right = tl.minimum(top + 1, POOLED_H - 1), tl.minimum(left + 1, POOLED_W - 1)
    down, across = (row - top)[:, None], (column - left)[:, None]
    p_map = pooled_ptr + map_ * (POOLED_H * POOLED_W * C) + o_c[None, :]
    top_left = tl.load(p_map + (top * POOLED_W + left)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    top_right = tl.load(p_map + (top * POOLED_W + right)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    bottom_left = tl.load(p_map + (bottom * POOLED_W + left)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    bottom_right = tl.load(p_map + (bottom * POOLED_W + right)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    upper = top_left * (1 - across) + top_right * across
    lower = bottom_left * (1 - across) + bottom_right * across

    p_x = x_ptr + map_ // classes * x_stride_b + map_ % classes * x_stride_t
    x = tl.load(p_x + p[:, None] * x_stride_p + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    p_out = out_ptr + map_ // classes * out_stride_b + map_ % classes * out_stride_t
    tl.store(p_out + p[:, None] * C + o_c[None, :], x + upper * (1 - down) + lower * down, mask=m)


@dataclass(frozen=True)
class UnpoolConfig(LaunchConfig):
    """Launch config: positions times channels per program."""

    elements: int = 2048
    num_warps: int = 4


def launch(
    x: Tensor,
    pooled: Tensor,
    resolution: Sequence[int],
    pooling: Sequence[int],
    out: Tensor,
    config: UnpoolConfig = UnpoolConfig(),
) -> Tensor:
    """Write `x [B, t, HW, C]` plus `pooled [B, t, hw, C]`, interpolated to `resolution`, to `out`.

    `out` may have any strides over B and t, and may be x.
    """
    (B, t, HW, C), (height, width), (pool_h, pool_w) = x.shape, resolution, pooling
    block_c = max(16, triton.next_power_of_2(C))
    positions = max(1, config.elements // block_c)
    launcher.run(
        unpool_kernel, (B * t * triton.cdiv(HW, positions),),
        x, pooled, out, t, *x.stride()[:3], *out.stride()[:2],
        (height // pool_h - 1) / max(height - 1, 1), (width // pool_w - 1) / max(width - 1, 1),
        C=C, H=height, W=width, POOL_H=pool_h, POOL_W=pool_w, BLOCK_C=block_c, POSITIONS=positions,
        config=config,
    )  # fmt: skip
    return out
