"""Attention within shifted windows, by head.

    a = softmax(q k^T - 100 * [k is of another region of the image than q]) v

for `qkv [B, t, HW, 3C]` in window order, with windows of N tokens and C channels in heads of d. The result
takes the place of the queries. Scores `[B * t * windows, heads, N, N]` and the mask `[windows, N, N]` are
never written to memory; regions follow from coordinates. Softmax is in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.window_attention import plain
from catseg_fast.kernels.window_attention.windows import Windows, token_region

MASKED = tl.constexpr(plain.MASKED)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
    qkv_ptr,  # [B, t, HW, 3C], window order; the attended values replace the queries
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
    """One window and head. Its N keys stay on the chip in two parts, KEYS and then at most REST."""
    dtype = qkv_ptr.dtype.element_ty
    N: tl.constexpr = WINDOW * WINDOW
    C: tl.constexpr = HEADS * D
    window = tl.program_id(0) // HEADS
    qkv_ptr += window.to(tl.int64) * (N * 3 * C) + tl.program_id(0) % HEADS * D
    down, across = window // (W // WINDOW) % (H // WINDOW), window % (W // WINDOW)
    last_row, last_column = down == H // WINDOW - 1, across == W // WINDOW - 1

    d = tl.arange(0, BLOCK_D)[None, :]
    n = tl.arange(0, KEYS)
    r = KEYS + tl.arange(0, REST)
    region_n = token_region(n, last_row, last_column, WINDOW, SHIFT)
    region_r = token_region(r, last_row, last_column, WINDOW, SHIFT)
    valid_n, valid_r = (n < N)[:, None] & (d < D), (r < N)[:, None] & (d < D)
    key_n = tl.load(qkv_ptr + n[:, None] * (3 * C) + C + d, valid_n, 0.0)
    key_r = tl.load(qkv_ptr + r[:, None] * (3 * C) + C + d, valid_r, 0.0)
    value_n = tl.load(qkv_ptr + n[:, None] * (3 * C) + 2 * C + d, valid_n, 0.0)
    value_r = tl.load(qkv_ptr + r[:, None] * (3 * C) + 2 * C + d, valid_r, 0.0)
    for start in range(0, N, QUERIES):
        m = start + tl.arange(0, QUERIES)
        valid = (m < N)[:, None] & (d < D)
        query = tl.load(qkv_ptr + m[:, None] * (3 * C) + d, valid, 0.0)
        score_n = tl.dot(query, tl.trans(key_n), input_precision=PRECISION)
        score_r = tl.dot(query, tl.trans(key_r), input_precision=PRECISION)
        if SHIFT > 0:
            region = token_region(m, last_row, last_column, WINDOW, SHIFT)
            score_n += tl.where(region[:, None] == region_n[None, :], 0.0, MASKED)
            score_r += tl.where(region[:, None] == region_r[None, :], 0.0, MASKED)
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
        tl.store(qkv_ptr + m[:, None] * (3 * C) + d, (attended / total[:, None]).to(dtype), valid)


@dataclass(frozen=True)
class AttentionConfig(LaunchConfig):
    """Launch config: queries per step."""

    queries: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None


@cache
def default_config(capability: int, problem: Problem) -> AttentionConfig:
    """Return a config that fits every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
    head_channels = problem.size("channels") // problem.size("heads")
    if problem.dtype == "fp32" or problem.size("window") > 16 or head_channels > 64:
        return AttentionConfig(queries=16, num_warps=4)
    return AttentionConfig(queries=16, num_warps=1, maxnreg=255 if capability >= 100 else None)


def candidates(capability: int, problem: Problem) -> tuple[AttentionConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    many = grid(default, queries=(16, 32, 64), num_warps=(1, 2, 4), num_stages=(1, 2))
    return default_first(default, [*many, *grid(default, num_warps=(1, 2), maxnreg=(None, 255))])


def interpreter_config(problem: Problem) -> AttentionConfig:
    """All queries in one step."""
    return AttentionConfig(queries=256, num_warps=4)


def problem(qkv: Tensor, windows: Windows, heads: int, *, input_precision: str) -> Problem:
    """What a measured config is found by."""
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
