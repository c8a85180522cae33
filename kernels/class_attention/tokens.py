"""Functions of both passes of the class attention on rows of tokens, one row per class and position."""

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
    """Load rows of tokens `[rows, BLOCK_C]` in fp32, from x or as averages of POOL_H x POOL_W positions."""
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
def feature_map(x):
    """phi(x) = elu(x) + 1; NaN where x is."""
    return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)))
