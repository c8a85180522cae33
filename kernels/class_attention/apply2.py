"""Second pass of the linear attention over classes, the MLP, and both residuals.

With phi(x) = elu(x) + 1, the key sums and means of values of `class_collect`, and `length` classes (padding
included), in each head:

    q = phi(W_q LN(x) + b_q + text_query)
    y = x + sum_j p_j value_j,  p_j = q_j key_sum_j / (q key_sum + eps)
    out = x + y + W_2 relu(W_1 LN(y) + b_1) + b_2

x and out are `[B, t, HW, C]`. The p_j are shares of one, and what they weigh are means of values: both fit in
fp16 whatever the keys are. Queries, shares, y and the hidden layer never reach memory. With pooling (h, w)
the tokens are averages of h x w positions, taken while x is read, y and the MLP are on the pooled grid, and
what they give is interpolated and added to x by `unpool.py`.

A crop's tokens are taken position by position, and class by class within each; a program makes `rows` of
them. Where they are of several positions, each position's queries are made and weighed in turn, so that no row
is wasted however many classes there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.class_attention.tokens import feature_map, load_tokens
from catseg_fast.kernels.class_attention.unpool2 import add_unpooled
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.descriptors import describe, fits
from catseg_fast.kernels.layer_norm import normalise


@triton.jit(do_not_specialize=["classes"])
def apply_kernel(
    x_ptr,  # [B, t, HW, C], strided over B, t and HW
    text_ptr,  # [B or 1, t, C], strided over the first two, or None
    value_ptr,  # [B, hw, heads, d, d], in the type of x
    key_sum_ptr,  # [B, hw, heads, d] fp32
    q,  # [C, C]: a pointer, or with TMA a descriptor
    q_bias_ptr,  # [C]
    fc1,  # [M, C], likewise
    fc1_bias_ptr,  # [M]
    fc2,  # [C, M], likewise
    fc2_bias_ptr,  # [C]
    out_ptr,  # [B, t, hw, C], output, strided over B and t; without the outer residual where there is pooling
    classes,  # t
    inverse_length,
    eps,
    x_stride_b,
    x_stride_t,
    x_stride_p,
    text_stride_b,
    text_stride_t,
    out_stride_b,
    out_stride_t,
    H: tl.constexpr,
    W: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # d, rounded up
    M: tl.constexpr,
    WHOLE: tl.constexpr,  # rows divide classes: each program has one position
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    D: tl.constexpr = C // HEADS
    HW: tl.constexpr = (H // POOL_H) * (W // POOL_W)
    dtype = x_ptr.dtype.element_ty
    parts = tl.cdiv(HW * classes, ROWS)  # programs per crop
    b = (tl.program_id(0) // parts).to(tl.int64)
    start = tl.program_id(0) % parts * ROWS
    first = start // classes
    if WHOLE:
        p = first
        o_t = start - first * classes + tl.arange(0, ROWS)
        m_row = tl.full((ROWS,), True, tl.int1)
        last = first
    else:
        row = start + tl.arange(0, ROWS)
        p = row // classes
        o_t = row - p * classes
        m_row = p < HW
        last = tl.minimum(start + ROWS, HW * classes) - 1
        last //= classes
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    EVEN: tl.constexpr = C == BLOCK_C
    m = m_row[:, None] if EVEN else m_row[:, None] & m_c[None, :]

    p_x = x_ptr + b * x_stride_b + o_t.to(tl.int64) * x_stride_t
    x = load_tokens(p_x, p, m_row, x_stride_p, C, BLOCK_C, W, POOL_H, POOL_W)
    normalised = normalise(x, C, BLOCK_C).to(dtype)
    # In fp32, a sum is apart from the larger number that it is added to, which would round each step.
    APART: tl.constexpr = dtype == tl.float32
    y = tl.zeros_like(x) if APART else x
    for position in range(first, last + 1):
        source = (b * HW + position) * C
        for head in range(HEADS):
            o_d = tl.arange(0, BLOCK_D)
            m_d = o_d < D
            channel = head * D + o_d
            w_q = _load(q, head * D, 0, BLOCK_D, BLOCK_C, head * D + D, C, C, TMA)
            query = tl.dot(normalised, tl.trans(w_q), input_precision=PRECISION)
            query += tl.load(q_bias_ptr + channel, m_d, 0.0).to(tl.float32)[None, :]
            if text_ptr is not None:
                p_text = text_ptr + b * text_stride_b + o_t.to(tl.int64)[:, None] * text_stride_t
                m_text = m_row[:, None] & m_d[None, :]
                query += tl.load(p_text + channel[None, :], m_text, 0.0).to(tl.float32)
            key_sum = tl.load(key_sum_ptr + source + channel, m_d, 0.0) * inverse_length
            share = feature_map(query) * key_sum[None, :]
            if not WHOLE:
                share = tl.where((p == position)[:, None], share, 0.0)
            share *= (1.0 / (tl.sum(share, 1) + eps * inverse_length))[:, None]
            p_value = value_ptr + (source + channel)[:, None] * D + (o_c % D)[None, :]
            m_value = (o_c // D == head)[None, :]
            if D < BLOCK_D:
                m_value &= m_d[:, None]
            value = tl.load(p_value, m_value, 0.0)
            y = tl.dot(share.to(dtype), value, y, input_precision=PRECISION)
    if APART:
        y += x
    if not EVEN:
        y = tl.where(m_c[None, :], y, 0.0)

    normalised = normalise(y, C, BLOCK_C).to(dtype)
    y += tl.load(fc2_bias_ptr + o_c, m_c, 0.0).to(tl.float32)[None, :]
    z = tl.zeros_like(y) if APART else y
    for k in range(0, M, HIDDEN):
        o_h = k + tl.arange(0, HIDDEN)
        w_1 = _load(fc1, k, 0, HIDDEN, BLOCK_C, M, C, C, TMA)
        hidden = tl.dot(normalised, tl.trans(w_1), input_precision=PRECISION)
        hidden += tl.load(fc1_bias_ptr + o_h, o_h < M, 0.0).to(tl.float32)[None, :]
        hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)
        w_2 = _load(fc2, 0, k, BLOCK_C, HIDDEN, C, M, M, TMA)
        z = tl.dot(hidden, tl.trans(w_2), z, input_precision=PRECISION)
    if APART:
        z += y

    if POOL_H * POOL_W == 1:  # read again, not held in registers all the while
        p_x = (p_x + p * x_stride_p)[:, None] + o_c[None, :]
        z += tl.load(p_x, m, 0.0, eviction_policy="evict_first").to(tl.float32)
    p_out = out_ptr + b * out_stride_b + o_t.to(tl.int64) * out_stride_t + p * C
    tl.store(p_out[:, None] + o_c[None, :], z.to(dtype), m)


@triton.jit
def _load(
    matrix,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    row_end,
    column_end,
    STRIDE: tl.constexpr,
    TMA: tl.constexpr,
):
    """The block `[ROWS, COLUMNS]` of a matrix from a row and column on; zero from the ends on."""
    if TMA:
        return matrix.load([row, column])
    else:
        o_row, o_column = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        m = (o_row < row_end) & (o_column < column_end)
        return tl.load(matrix + o_row * STRIDE + o_column, m, 0.0)


@dataclass(frozen=True)
class ApplyConfig(LaunchConfig):
    """Launch config: tokens per program, hidden channels per step, and how it reads the weights.

    `tma` is for compute capability 9.0 and newer. Sizes that no tensor descriptor takes use pointers anyway.
    """

    rows: int
    hidden: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tma: bool = False


# Few steps: each takes the interpreter milliseconds, however large it is.
INTERPRETER = ApplyConfig(rows=64, hidden=512, num_warps=1, num_stages=1)


@cache
def default_config(capability: int, dtype: torch.dtype, precision: str, channels: int) -> ApplyConfig:
    """A config for GPUs of a compute capability (as 80, 86, 89, 90, 100), at `channels` channels."""
    if dtype == torch.float32:
        num_stages = 1 if precision == "tf32x3" else 2
        return ApplyConfig(rows=16, hidden=16, num_warps=8, num_stages=num_stages, maxnreg=255)
    if capability in (86, 89):
        return ApplyConfig(rows=64, hidden=64, num_warps=8, num_stages=2)
    return ApplyConfig(rows=64, hidden=64, num_warps=4, num_stages=2, tma=capability >= 90)


def candidates(capability: int, dtype: torch.dtype, precision: str, channels: int) -> tuple[ApplyConfig, ...]:
    """Configs worth timing, the default first."""
    default = default_config(capability, dtype, precision, channels)
    if dtype == torch.float32:
        tiles, hidden = [(16, 4), (16, 8), (32, 4), (32, 8), (64, 8)], (16, 32)
    else:
        tiles, hidden = [(32, 4), (64, 4), (64, 8), (128, 8)], (32, 64)
    others = [
        replace(tiled, rows=rows, num_warps=num_warps)
        for rows, num_warps in tiles
        for tiled in grid(default, hidden=hidden)
    ]
    more = grid(default, num_stages=(1, 2, 3), tma=(False, default.tma), maxnreg=(None, 168))
    return default_first(default, [*others, *more])


def launch(
    x: Tensor,
    text_query: Tensor | None,
    value: Tensor,
    key_sum: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    length: int,
    eps: float,
    resolution: Sequence[int],
    pooling: Sequence[int],
    input_precision: str,
    config: ApplyConfig,
    out: Tensor | None = None,
) -> Tensor:
    """Class attention and MLP `[B, t, HW, C]` of `x` under the sums of `class_collect`.

    Args:
        x: `[B, t, HW, C]`, with dense channels.
        text_query: `[B or 1, t, C]`, with dense channels, or None.
        value, key_sum: as `collect.launch` makes them with `means`.
        weights: of the queries, of the first and of the second layer, each with its bias.
        heads, length, eps: of the attention.
        resolution: (H, W).
        pooling: positions of a token, down and across.
        input_precision: of products of fp32 numbers.
        config: the tiles.
        out: where the result goes, strided over B and t; by default a new tensor. It may be x.
    """
    (B, classes, HW, C), (H, W), (pool_h, pool_w) = x.shape, resolution, pooling
    q, q_bias, fc1, fc1_bias, fc2, fc2_bias = weights
    positions, M = (H // pool_h) * (W // pool_w), len(fc1)
    out = x.new_empty((B, classes, HW, C)) if out is None else out
    pooled = pool_h * pool_w > 1
    tokens = x.new_empty((B, classes, positions, C)) if pooled else out
    block_c, block_d = (max(16, triton.next_power_of_2(size)) for size in (C, C // heads))
    blocks = [block_d, block_c], [config.hidden, block_c], [block_c, config.hidden]
    tma = config.tma and C == block_d * heads and all(map(fits, (q, fc1, fc2), blocks))
    if tma:
        q, fc1, fc2 = map(describe, (q, fc1, fc2), blocks)
    text_strides = text_query.expand(B, -1, -1).stride()[:2] if text_query is not None else (0, 0)
    launcher.run(
        apply_kernel,
        (B * triton.cdiv(positions * classes, config.rows),),
        x, text_query, value, key_sum, q, q_bias, fc1, fc1_bias, fc2, fc2_bias, tokens,
        classes, 1 / length, eps, *x.stride()[:3], *text_strides, *tokens.stride()[:2],
        config=config,
        H=H, W=W, POOL_H=pool_h, POOL_W=pool_w,
        C=C, BLOCK_C=block_c, HEADS=heads, BLOCK_D=block_d, M=M,
        WHOLE=classes % config.rows == 0,
        ROWS=config.rows, HIDDEN=config.hidden, TMA=tma, PRECISION=input_precision,
    )  # fmt: skip
    return add_unpooled(x, tokens, resolution, pooling, out) if pooled else out
