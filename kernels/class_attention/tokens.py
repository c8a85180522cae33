"""What both passes of the class attention do to rows of tokens, one row per class and position."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tokens(
    x_ptr,  # of each row's crop and class
    p,  # token of each row
    m_row,
    x_stride_p,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    W: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
):
    """Rows of tokens `[rows, BLOCK_C]` in fp32: of x itself, or averages over POOL_H x POOL_W positions."""
    o_c = tl.arange(0, BLOCK_C)
    m = m_row[:, None] if C == BLOCK_C else m_row[:, None] & (o_c < C)[None, :]
    corner = p // (W // POOL_W) * POOL_H * W + p % (W // POOL_W) * POOL_W
    x = tl.load((x_ptr + corner * x_stride_p)[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    for i in tl.static_range(1, POOL_H * POOL_W):
        position = corner + i // POOL_W * W + i % POOL_W
        x += tl.load((x_ptr + position * x_stride_p)[:, None] + o_c[None, :], mask=m, other=0.0).to(
            tl.float32
        )
    return x * (1.0 / (POOL_H * POOL_W))


@triton.jit
def load_matrix(
    ptr, o_row, o_column, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr
):
    """`[rows, columns]` of a row-major ROWS x COLUMNS matrix; zero outside, unless EVEN: all is inside."""
    p = ptr + o_row[:, None] * row_stride + o_column[None, :]
    if EVEN:
        return tl.load(p)
    return tl.load(p, mask=(o_row < ROWS)[:, None] & (o_column < COLUMNS)[None, :], other=0.0)
