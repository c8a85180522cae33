"""Second pass of the linear attention over classes, the MLP, and both residuals.

With phi(x) = elu(x) + 1, the key sums and means of values of `class_collect`, and `length` classes (padding
included), in each head:

    q = phi(W_q LN(x) + b_q + text_query)
    y = x + sum_j p_j mean_j,  p_j = q_j key_sum_j / (q key_sum + eps)
    out = x + y + W_2 relu(W_1 LN(y) + b_1) + b_2

x and out are `[B, t, HW, C]`. The p_j add up to one and weigh means of values, so both fit in fp16 for any
keys. Queries, the p_j, y and the hidden layer never reach memory. With pooling (h, w), tokens are averages of
h x w positions, taken while x is read; y and the MLP are computed on the pooled grid, and `unpool.py`
interpolates the result and adds it to x.

A crop's tokens are ordered by position, then by class; a program computes `rows` of them. If they belong to
several positions, the program attends to the positions in turn, so that no row is wasted for any number of
classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.class_attention import unpool
from catseg_fast.kernels.class_attention.tokens import feature_map, load_tokens
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.descriptors import describe, fits
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.layer_norm import normalise
from catseg_fast.kernels.products import add_after


@triton.jit(do_not_specialize=["classes"])
def apply_kernel(
    x_ptr,  # [B, t, HW, C], strided over B, t and HW
    text_ptr,  # [B or 1, t, C], strided over the first two, or None
    means_ptr,  # [B, hw, heads, d, d], in the type of x
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
    # In fp32, a product is summed up before the larger addend is added, which would round each step.
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
            q_bias = tl.load(q_bias_ptr + channel, m_d, 0.0).to(tl.float32)
            query = add_after(query, q_bias[None, :], dtype)
            if text_ptr is not None:
                p_text = text_ptr + b * text_stride_b + o_t.to(tl.int64)[:, None] * text_stride_t
                m_text = m_row[:, None] & m_d[None, :]
                query += tl.load(p_text + channel[None, :], m_text, 0.0).to(tl.float32)
            key_sum = tl.load(key_sum_ptr + source + channel, m_d, 0.0) * inverse_length
            share = feature_map(query) * key_sum[None, :]
            share *= (1.0 / (tl.sum(share, 1) + eps * inverse_length))[:, None]
            if not WHOLE:
                share = tl.where((p == position)[:, None], share, 0.0)
            p_value = means_ptr + (source + channel)[:, None] * D + (o_c % D)[None, :]
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
        fc1_bias = tl.load(fc1_bias_ptr + o_h, o_h < M, 0.0).to(tl.float32)
        hidden = add_after(hidden, fc1_bias[None, :], dtype)
        hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)
        w_2 = _load(fc2, 0, k, BLOCK_C, HIDDEN, C, M, M, TMA)
        z = tl.dot(hidden, tl.trans(w_2), z, input_precision=PRECISION)
    if APART:
        z += y

    if POOL_H * POOL_W == 1:  # read again rather than held in registers
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
    """The block `[ROWS, COLUMNS]` of a matrix that starts at a row and column; zero outside the matrix."""
    if TMA:
        return matrix.load([row, column])
    else:
        o_row, o_column = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        m = (o_row < row_end) & (o_column < column_end)
        return tl.load(matrix + o_row * STRIDE + o_column, m, 0.0)


@dataclass(frozen=True)
class ApplyConfig(LaunchConfig):
    """Launch config: tokens per program, hidden channels per step, and the way that weights are read.

    `tma` needs compute capability 9.0 or higher. Sizes that do not fit a tensor descriptor use pointers.
    """

    version: ClassVar[int] = 2
    rows: int
    hidden: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tma: bool = False


@cache
def default_config(capability: int, problem: Problem) -> ApplyConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    if problem.dtype == "fp32":
        num_stages = 1 if problem.precision == "tf32x3" else 2
        return ApplyConfig(rows=16, hidden=16, num_warps=8, num_stages=num_stages, maxnreg=255)
    if problem.size("channels") > 128:
        return ApplyConfig(rows=32, hidden=32, num_warps=4, num_stages=2)
    if capability < 90:
        return ApplyConfig(rows=64, hidden=32, num_warps=4, num_stages=2)
    # On capability 100, Triton 3.6 aims at three programs by itself, and spills.
    maxnreg = 255 if capability >= 100 else None
    return ApplyConfig(rows=64, hidden=64, num_warps=4, num_stages=2, maxnreg=maxnreg, tma=True)


def candidates(capability: int, problem: Problem) -> tuple[ApplyConfig, ...]:
    """Configs worth timing, the default first."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
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


def interpreter_config(problem: Problem) -> ApplyConfig:
    """Return a config with few steps: the interpreter needs milliseconds for each, whatever its size."""
    return ApplyConfig(rows=64, hidden=512, num_warps=1, num_stages=1)


def problem(
    x: Tensor,
    text_query: Tensor | None,
    means: Tensor,
    key_sum: Tensor,
    q: Tensor,
    q_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    heads: int,
    length: int,
    eps: float,
    resolution: Sequence[int],
    pooling: Sequence[int],
    *,
    input_precision: str,
    out: Tensor | None = None,
) -> Problem:
    """The sizes and types by which a measured config is found."""
    sizes = {"positions": x.shape[2], "channels": x.shape[3], "heads": heads, "hidden": len(fc1)}
    pooled = pooling[0] * pooling[1]
    return Problem.of("class_apply", "apply", ApplyConfig, x, input_precision, **sizes, pooled=pooled)


def launch(
    x: Tensor,
    text_query: Tensor | None,
    means: Tensor,
    key_sum: Tensor,
    q: Tensor,
    q_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    heads: int,
    length: int,
    eps: float,
    resolution: Sequence[int],
    pooling: Sequence[int],
    *,
    input_precision: str,
    config: ApplyConfig,
    out: Tensor | None = None,
) -> Tensor:
    """Class attention and MLP `[B, t, HW, C]` of `x` under the means and sums of `class_collect`.

    The result goes to `out`, strided over B and t, which may be x; by default to a new tensor.
    """
    (B, t, HW, C), (height, width), (pool_h, pool_w) = x.shape, resolution, pooling
    positions, pooled = (height // pool_h) * (width // pool_w), pool_h * pool_w > 1
    out = x.new_empty((B, t, HW, C)) if out is None else out
    tokens = x.new_empty((B, t, positions, C)) if pooled else out
    block_c, block_d = (max(16, triton.next_power_of_2(size)) for size in (C, C // heads))
    matrices, blocks = (q, fc1, fc2), ((block_d, block_c), (config.hidden, block_c), (block_c, config.hidden))
    tma = config.tma and block_d * heads == C and all(map(fits, matrices, blocks))
    w_q, w_1, w_2 = map(describe, matrices, blocks) if tma else matrices
    launcher.run(
        apply_kernel, (B * triton.cdiv(positions * t, config.rows),),
        x, text_query, means, key_sum, w_q, q_bias, w_1, fc1_bias, w_2, fc2_bias, tokens,
        t, 1 / length, eps, *x.stride()[:3],
        *(text_query.expand(B, -1, -1).stride()[:2] if text_query is not None else (0, 0)),
        *tokens.stride()[:2],
        H=height, W=width, POOL_H=pool_h, POOL_W=pool_w,
        C=C, BLOCK_C=block_c, HEADS=heads, BLOCK_D=block_d, M=len(fc1), WHOLE=t % config.rows == 0,
        ROWS=config.rows, HIDDEN=config.hidden, TMA=tma, PRECISION=input_precision, config=config,
    )  # fmt: skip
    return unpool.launch(x, tokens, resolution, pooling, out) if pooled else out


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
