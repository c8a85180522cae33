"""Attention within shifted windows, by head.

    a = softmax(q k^T - 100 * [k is of another region of the image than q]) v

for `qkv [B, t, HW, 3C]` in image order, with windows of N tokens and C channels in heads of d. The result
replaces the queries. Cyclic shift and window partition are index arithmetic. Scores
`[B * t * windows, heads, N, N]` and the mask `[windows, N, N]` are never written to memory: regions are
computed from coordinates, and windows of a single region need no mask. Softmax is in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.window_attention import plain
from catseg_fast.kernels.window_attention.windows import Windows, window_position, window_region

MASKED = tl.constexpr(plain.MASKED)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
    qkv_ptr,  # [B, t, HW, 3C], image order; the attended values replace the queries
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one window and head. Its N keys stay on the chip in two parts: KEYS, then at most REST."""
    dtype = qkv_ptr.dtype.element_ty
    N: tl.constexpr = WINDOW * WINDOW
    C: tl.constexpr = HEADS * D
    DOWN: tl.constexpr = H // WINDOW
    ACROSS: tl.constexpr = W // WINDOW
    window = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    down, across = window // ACROSS % DOWN, window % ACROSS
    p_qkv = qkv_ptr + (window // (DOWN * ACROSS)).to(tl.int64) * (H * W * 3 * C) + head * D

    d = tl.arange(0, BLOCK_D)[None, :]
    n = tl.arange(0, KEYS)
    r = KEYS + tl.arange(0, REST)
    m_n, m_r = (n < N)[:, None] & (d < D), (r < N)[:, None] & (d < D)
    p_n = p_qkv + window_position(n, down, across, H, W, WINDOW, SHIFT)[:, None] * (3 * C) + d
    p_r = p_qkv + window_position(r, down, across, H, W, WINDOW, SHIFT)[:, None] * (3 * C) + d
    key_n = tl.load(p_n + C, m_n, 0.0)
    key_r = tl.load(p_r + C, m_r, 0.0)
    value_n = tl.load(p_n + 2 * C, m_n, 0.0)
    value_r = tl.load(p_r + 2 * C, m_r, 0.0)
    for start in range(0, N, QUERIES):
        q = start + tl.arange(0, QUERIES)
        m_q = (q < N)[:, None] & (d < D)
        o_q = window_position(q, down, across, H, W, WINDOW, SHIFT)[:, None] * (3 * C) + d
        query = tl.load(p_qkv + o_q, m_q, 0.0)
        score_n = tl.dot(query, tl.trans(key_n), input_precision=PRECISION)
        score_r = tl.dot(query, tl.trans(key_r), input_precision=PRECISION)
        if SHIFT > 0:  # noqa: SIM102  # known when compiled, as the other is not
            if (down == DOWN - 1) | (across == ACROSS - 1):
                region_n = window_region(n, down, across, H, W, WINDOW, SHIFT)
                region_r = window_region(r, down, across, H, W, WINDOW, SHIFT)
                region = window_region(q, down, across, H, W, WINDOW, SHIFT)
                score_n = tl.where(region[:, None] == region_n[None, :], score_n, score_n + MASKED)
                score_r = tl.where(region[:, None] == region_r[None, :], score_r, score_r + MASKED)
        if KEYS > N:
            score_n = tl.where(n[None, :] < N, score_n, float("-inf"))
        if KEYS + REST > N:
            score_r = tl.where(r[None, :] < N, score_r, float("-inf"))
        highest = tl.maximum(tl.max(score_n, 1), tl.max(score_r, 1)) * LOG2E
        score_n = tl.exp2(score_n * LOG2E - highest[:, None])
        score_r = tl.exp2(score_r * LOG2E - highest[:, None])
        total = tl.sum(score_n, 1) + tl.sum(score_r, 1)
        attended = tl.dot(score_n.to(dtype), value_n, input_precision=PRECISION)
        attended = tl.dot(score_r.to(dtype), value_r, attended, input_precision=PRECISION)
        tl.store(p_qkv + o_q, (attended * (1.0 / total)[:, None]).to(dtype), m_q)


@dataclass(frozen=True)
class AttentionConfig(LaunchConfig):
    """Launch config: queries per step."""

    version: ClassVar[int] = 2
    queries: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None


@cache
def default_config(capability: int, problem: Problem) -> AttentionConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    head_channels = problem.size("channels") // problem.size("heads")
    if problem.dtype == "fp32" or problem.size("window") > 16 or head_channels > 64:
        return AttentionConfig(queries=16, num_warps=8 if capability >= 100 else 4)
    if capability == 90 and head_channels <= 32:
        return AttentionConfig(queries=64, num_warps=4, maxnreg=128)  # four programs
    if capability >= 100:
        return AttentionConfig(queries=64, num_warps=4, maxnreg=255)  # Triton 3.9 aims at three, and spills
    return AttentionConfig(queries=64, num_warps=4)


def candidates(capability: int, problem: Problem) -> tuple[AttentionConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    many = grid(default, queries=(16, 32, 64), num_warps=(1, 2, 4), num_stages=(1, 2), maxnreg=(None,))
    return default_first(default, [*many, *grid(default, maxnreg=(96, 128, 255))])


def interpreter_config(problem: Problem) -> AttentionConfig:
    """Return a config with all queries in one step."""
    return AttentionConfig(queries=256, num_warps=4)


def problem(qkv: Tensor, windows: Windows, heads: int, *, input_precision: str) -> Problem:
    """The sizes and types by which a measured config is found."""
    _, _, HW, width = qkv.shape
    sizes = {"positions": HW, "channels": width // 3, "heads": heads, "window": windows.window}
    return Problem.of("window_block", "attention", AttentionConfig, qkv, input_precision, **sizes)


def launch(
    qkv: Tensor, windows: Windows, heads: int, *, input_precision: str, config: AttentionConfig
) -> Tensor:
    """Overwrite the queries of `qkv [B, t, HW, 3C]`, and return it."""
    B, t, HW, width = qkv.shape
    # Two powers of two, 16 or more, that hold the N tokens of a window with little to spare: 144 = 128 + 16.
    N, D = windows.window**2, width // 3 // heads
    keys = max(16, triton.next_power_of_2(N) // 2)
    launcher.run(
        attention_kernel, (B * t * (HW // N) * heads,), qkv,
        **windows.constants(), HEADS=heads, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)),
        QUERIES=config.queries, KEYS=keys, REST=max(16, triton.next_power_of_2(N - keys)),
        PRECISION=input_precision, config=config,
    )  # fmt: skip
    return qkv


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
