"""Second pass of the linear attention over classes, the MLP, and both residuals.

With phi(x) = elu(x) + 1, the sums of `class_collect`, and `length` classes (padding included), in each head:

    q = phi(W_q LN(x) + b_q + text_query)
    y = x + sum_j p_j (key_value_j length / key_sum_j),  p_j = q_j key_sum_j / (q key_sum + eps)
    out = x + y + W_2 relu(W_1 LN(y) + b_1) + b_2

x and out are `[B, t, HW, C]`. The p_j are shares of one, and what they weigh are means of values: both fit in
fp16 whatever the keys are. Queries, shares, y and the hidden layer never reach memory. With pooling (h, w)
the tokens are averages of h x w positions, taken while x is read, y and the MLP are on the pooled grid, and
what they give is interpolated and added to x by `unpool.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.class_attention import unpool
from catseg_fast.kernels.class_attention.tokens import load_matrix, load_tokens
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.layer_norm import normalise


@triton.jit(do_not_specialize=["classes", "tokens"])
def apply_kernel(
    x_ptr,  # [B, t, HW, C]
    text_ptr,  # [B or 1, t, C], or None
    key_value_ptr,  # [B, hw, heads, d, d] fp32
    key_sum_ptr,  # [B, hw, heads, d] fp32
    q_ptr,  # [C, C]
    q_bias_ptr,  # [C]
    fc1_ptr,  # [M, C]
    fc1_bias_ptr,  # [M]
    fc2_ptr,  # [C, M]
    fc2_bias_ptr,  # [C]
    out_ptr,  # [B, t, hw, C], output, contiguous; without the outer residual where there is pooling
    classes,  # t
    tokens,  # B * hw
    inverse_length,
    eps,
    x_stride_b,
    x_stride_t,
    x_stride_p,
    text_stride_b,
    text_stride_t,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, rounded up
    POSITIONS: tl.constexpr,  # positions per program
    CLASSES: tl.constexpr,  # classes of each position
    HIDDEN: tl.constexpr,  # hidden channels per step
    PRECISION: tl.constexpr,
):
    D: tl.constexpr = C // HEADS
    HW: tl.constexpr = (H // POOL_H) * (W // POOL_W)
    dtype = x_ptr.dtype.element_ty
    parts = tl.cdiv(classes, CLASSES)
    first = tl.program_id(0) // parts * POSITIONS

    row = tl.arange(0, POSITIONS * CLASSES)
    token = first + row // CLASSES
    b, p = (token // HW).to(tl.int64), token % HW
    o_t = tl.program_id(0) % parts * CLASSES + row % CLASSES
    m_row = (o_t < classes) & (token < tokens)
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
    for head in range(HEADS):
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        channel = head * D + o_d
        w_q = load_matrix(q_ptr, channel, o_c, C, C, C, EVEN and D == BLOCK_D)
        q = tl.dot(normalised, tl.trans(w_q), input_precision=PRECISION)
        q += tl.load(q_bias_ptr + channel, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if text_ptr is not None:
            p_text = text_ptr + b * text_stride_b + o_t.to(tl.int64) * text_stride_t
            m_text = m_row[:, None] & m_d[None, :]
            q += tl.load(p_text[:, None] + channel[None, :], mask=m_text, other=0.0).to(tl.float32)
        q = tl.where(q > 0, q + 1.0, tl.exp(tl.minimum(q, 0.0)))
        m_head = m_d[:, None] & (o_c // D == head)[None, :]
        for i in tl.static_range(POSITIONS):
            source = tl.minimum(first + i, tokens - 1).to(tl.int64) * C
            key_sum = tl.load(key_sum_ptr + source + channel, mask=m_d, other=0.0) * inverse_length
            share = q * key_sum[None, :]
            if POSITIONS > 1:
                share = tl.where((token == first + i)[:, None], share, 0.0)
            share /= tl.sum(share, 1)[:, None] + eps * inverse_length
            p_key_value = key_value_ptr + source * D + channel[:, None] * D + (o_c % D)[None, :]
            values = tl.load(p_key_value, mask=m_head, other=0.0) / tl.maximum(key_sum, 1e-37)[:, None]
            y = tl.dot(share.to(dtype), values.to(dtype), y, input_precision=PRECISION)
    if APART:
        y += x
    if not EVEN:
        y = tl.where(m_c[None, :], y, 0.0)

    normalised = normalise(y, C, BLOCK_C).to(dtype)
    y += tl.load(fc2_bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    z = tl.zeros_like(y) if APART else y
    EVEN_HIDDEN: tl.constexpr = EVEN and (M % HIDDEN == 0)
    for start in range(0, M, HIDDEN):
        o_h = start + tl.arange(0, HIDDEN)
        fc1 = load_matrix(fc1_ptr, o_h, o_c, C, M, C, EVEN_HIDDEN)
        hidden = tl.dot(normalised, tl.trans(fc1), input_precision=PRECISION)
        hidden += tl.load(fc1_bias_ptr + o_h, mask=o_h < M, other=0.0).to(tl.float32)[None, :]
        fc2 = load_matrix(fc2_ptr, o_c, o_h, M, C, M, EVEN_HIDDEN)
        z = tl.dot(tl.maximum(hidden, 0.0).to(dtype), tl.trans(fc2), z, input_precision=PRECISION)
    if APART:
        z += y

    if POOL_H * POOL_W == 1:  # read again, not held in registers all the while
        p_x = (p_x + p * x_stride_p)[:, None] + o_c[None, :]
        z += tl.load(p_x, mask=m, other=0.0, eviction_policy="evict_first").to(tl.float32)
    p_out = out_ptr + ((b * classes + o_t) * HW + p) * C
    tl.store(p_out[:, None] + o_c[None, :], z, mask=m)


@dataclass(frozen=True)
class ApplyConfig(LaunchConfig):
    """Launch config: positions per program and classes of each, hidden channels per step."""

    positions: int
    classes: int
    hidden: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# By compute capability: rows (positions times classes) and warps of a program, 16-bit types.
TILES = {80: (64, 4), 86: (64, 8), 89: (64, 8), 90: (128, 8), 100: (64, 4)}


@cache
def default_config(capability: int, problem: Problem) -> ApplyConfig:
    """Return a config for GPUs of a compute capability, at the published sizes or smaller ones."""
    if problem.dtype == "fp32":
        num_stages = 1 if problem.precision == "tf32x3" else 2
        return ApplyConfig(
            positions=1, classes=16, hidden=16, num_warps=8, num_stages=num_stages, maxnreg=255
        )
    rows, num_warps = TILES[capability]
    positions = 2 if problem.classes <= rows // 2 else 1
    return ApplyConfig(positions, rows // positions, hidden=64, num_warps=num_warps, num_stages=2)


def interpreter_config(problem: Problem) -> ApplyConfig:
    """Few steps: each takes the interpreter milliseconds, however large it is."""
    return ApplyConfig(positions=16, classes=4, hidden=512, num_warps=1, num_stages=1)


def candidates(capability: int, problem: Problem) -> tuple[ApplyConfig, ...]:
    """Configs worth timing, the default first."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
        tiles, hidden = [(1, 16, 4), (1, 16, 8), (1, 32, 4), (1, 32, 8), (1, 64, 8), (2, 16, 8)], (16, 32)
    else:
        tiles, hidden = [(1, 32, 4), (1, 128, 8), (2, 64, 8), (4, 32, 8)], (32, 64)
        tiles += [(n, 64 // n, num_warps) for n in (1, 2, 4) for num_warps in (4, 8)]
    others = [
        replace(tiled, positions=positions, classes=rows, num_warps=num_warps)
        for positions, rows, num_warps in tiles
        for tiled in grid(default, hidden=hidden)
    ]
    return default_first(default, [*others, *grid(default, num_stages=(1, 2, 3))])


def problem(
    x: Tensor,
    text_query: Tensor | None,
    key_value: Tensor,
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
) -> Problem:
    """What a measured config is found by."""
    sizes = {"positions": x.shape[2], "channels": x.shape[3], "heads": heads, "hidden": len(fc1)}
    pooled = pooling[0] * pooling[1]
    return Problem.of("class_apply", "apply", ApplyConfig, x, input_precision, **sizes, pooled=pooled)


def launch(
    x: Tensor,
    text_query: Tensor | None,
    key_value: Tensor,
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
) -> Tensor:
    """Class attention and MLP `[B, t, HW, C]` of `x` under the sums of `class_collect`."""
    (B, t, _, C), (height, width), (pool_h, pool_w) = x.shape, resolution, pooling
    positions = (height // pool_h) * (width // pool_w)
    tokens = x.new_empty((B, t, positions, C))
    launcher.run(
        apply_kernel, (triton.cdiv(B * positions, config.positions) * triton.cdiv(t, config.classes),),
        x, text_query, key_value, key_sum, q, q_bias, fc1, fc1_bias, fc2, fc2_bias, tokens,
        t, B * positions, 1 / length, eps, *x.stride()[:3],
        *(text_query.expand(B, -1, -1).stride()[:2] if text_query is not None else (0, 0)),
        C=C, HEADS=heads, M=len(fc1), H=height, W=width, POOL_H=pool_h, POOL_W=pool_w,
        BLOCK_C=max(16, triton.next_power_of_2(C)), BLOCK_D=max(16, triton.next_power_of_2(C // heads)),
        POSITIONS=config.positions, CLASSES=config.classes, HIDDEN=config.hidden, PRECISION=input_precision,
        config=config,
    )  # fmt: skip
    return tokens if pool_h * pool_w == 1 else unpool.launch(x, tokens, resolution, pooling)


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
