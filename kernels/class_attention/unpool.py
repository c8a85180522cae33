"""The way back from pooled tokens: bilinear interpolation to all positions, corners aligned, added to x.

A position (r, s) of the H x W grid is at (r (h - 1) / (H - 1), s (w - 1) / (W - 1)) of the pooled h x w grid;
out is x plus the four pooled tokens around that place, weighted by distance. x and out are `[B, t, HW, C]`,
pooled is `[B, t, hw, C]`; the interpolated tokens never reach memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch.compile_target import CompileTarget

# Positions times channels of a program.
ELEMENTS = 2048


@triton.jit(do_not_specialize=["classes"])
def _unpool_kernel(
    x_ptr,  # [B, t, HW, C]
    pooled_ptr,  # [B * t, hw, C]
    out_ptr,  # [B * t, HW, C], output: x plus the interpolated pooled
    classes,  # t
    x_stride_b,
    x_stride_t,
    x_stride_p,
    row_scale,  # pooled rows a row
    column_scale,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROWS: tl.constexpr = HEIGHT // POOL_H
    COLUMNS: tl.constexpr = WIDTH // POOL_W
    parts: tl.constexpr = (HEIGHT * WIDTH + BLOCK_P - 1) // BLOCK_P
    map_ = (tl.program_id(0) // parts).to(tl.int64)
    p = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    m = (p < HEIGHT * WIDTH)[:, None] & (o_c < C)[None, :]

    row, column = (p // WIDTH).to(tl.float32) * row_scale, (p % WIDTH).to(tl.float32) * column_scale
    top, left = tl.minimum(row.to(tl.int32), ROWS - 1), tl.minimum(column.to(tl.int32), COLUMNS - 1)
    bottom, right = tl.minimum(top + 1, ROWS - 1), tl.minimum(left + 1, COLUMNS - 1)
    down, across = (row - top)[:, None], (column - left)[:, None]
    p_map = pooled_ptr + map_ * (ROWS * COLUMNS * C) + o_c[None, :]
    top_left = tl.load(p_map + (top * COLUMNS + left)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    top_right = tl.load(p_map + (top * COLUMNS + right)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    bottom_left = tl.load(p_map + (bottom * COLUMNS + left)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    bottom_right = tl.load(p_map + (bottom * COLUMNS + right)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    upper = top_left * (1 - across) + top_right * across
    lower = bottom_left * (1 - across) + bottom_right * across

    p_x = x_ptr + map_ // classes * x_stride_b + map_ % classes * x_stride_t
    x = tl.load(p_x + p[:, None] * x_stride_p + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    p_out = out_ptr + map_ * (HEIGHT * WIDTH * C)
    tl.store(p_out + p[:, None] * C + o_c[None, :], x + upper * (1 - down) + lower * down, mask=m)


def add_unpooled(x: Tensor, pooled: Tensor, resolution: Sequence[int], pooling: Sequence[int]) -> Tensor:
    """`x [B, t, HW, C]` plus `pooled [B, t, hw, C]` interpolated to `resolution`; part of `class_apply`."""
    (B, classes, HW, C), (H, W) = x.shape, resolution
    rows, columns = H // pooling[0], W // pooling[1]
    block_c = max(16, triton.next_power_of_2(C))
    block_p = max(1, ELEMENTS // block_c)
    out = x.new_empty((B, classes, HW, C))
    _unpool_kernel[(B * classes * triton.cdiv(HW, block_p),)](
        x,
        pooled,
        out,
        classes,
        *x.stride()[:3],
        (rows - 1) / max(H - 1, 1),
        (columns - 1) / max(W - 1, 1),
        C=C,
        HEIGHT=H,
        WIDTH=W,
        POOL_H=pooling[0],
        POOL_W=pooling[1],
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def compile_targets(capability: int) -> list[CompileTarget]:
    """The kernel at C = 128 and 24 x 24, with 2 x 2 pooling; the same for all capabilities."""
    strides = ("x_stride_b", "x_stride_t", "x_stride_p")
    return [
        CompileTarget(
            name="fp16",
            kernel=_unpool_kernel,
            signature={
                **dict.fromkeys(("x_ptr", "pooled_ptr", "out_ptr"), "*fp16"),
                **dict.fromkeys(("classes", *strides), "i32"),
                **dict.fromkeys(("row_scale", "column_scale"), "fp32"),
            },
            constexprs={
                "C": 128,
                "HEIGHT": 24,
                "WIDTH": 24,
                "POOL_H": 2,
                "POOL_W": 2,
                "BLOCK_P": ELEMENTS // 128,
                "BLOCK_C": 128,
            },
            num_warps=4,
            num_stages=1,
            divisible=strides,
        )
    ]
