"""Attention within shifted windows, by head.

    a = softmax(q k^T - 100 * [k is of another region of the image than q]) v

for `qkv [B, t, HW, 3C]` in window order, with windows of N tokens and C channels in heads of d. The result
takes the place of the queries. Scores `[B * t * windows, heads, N, N]` and the mask `[windows, N, N]` are
never written to memory; regions follow from coordinates. Softmax is in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch.checks import DTYPES
from catseg_fast.kernels.launch.compile_target import CompileTarget
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.tunable import Tunable, Workload
from catseg_fast.kernels.window_attention.windows import Windows, token_region
from catseg_fast.reference import window_attention

MASKED = tl.constexpr(window_attention.MASKED)
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
    """Launch config: queries a step."""

    queries: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None


@cache
def default_config(capability: int, dtype: torch.dtype, head_channels: int, window: int) -> AttentionConfig:
    """A config that fits every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
    if dtype == torch.float32 or window > 16 or head_channels > 64:
        return AttentionConfig(queries=16, num_warps=4)
    return AttentionConfig(queries=16, num_warps=1, maxnreg=255 if capability >= 100 else None)


def candidates(
    capability: int, dtype: torch.dtype, head_channels: int, window: int
) -> tuple[AttentionConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, dtype, head_channels, window)
    many = grid(default, queries=(16, 32, 64), num_warps=(1, 2, 4), num_stages=(1, 2))
    return default_first(default, [*many, *grid(default, num_warps=(1, 2), maxnreg=(None, 255))])


def launch(qkv: Tensor, windows: Windows, heads: int, input_precision: str, config: AttentionConfig) -> None:
    """Overwrite the queries of `qkv [B, t, HW, 3C]`."""
    B, t, HW, width = qkv.shape
    attention_kernel[(B * t * (HW // windows.window**2) * heads,)](
        qkv, **_constants(windows, width // 3, heads, input_precision, config), num_warps=config.num_warps,
        num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip


def problem(
    dtype: torch.dtype, input_precision: str, crop_classes: int, HW: int, C: int, heads: int, window: int
) -> Problem:
    """What a measured config is found by."""
    sizes = {"positions": HW, "channels": C, "heads": heads, "window": window}
    return Problem.of(
        "window_block", "attention", AttentionConfig, dtype, input_precision, crop_classes, **sizes
    )


def tunable(workload: Workload) -> Tunable:
    """The kernel on a shifted block."""
    w, (B, t, HW, C) = workload, workload.state
    windows = Windows(w.height, w.width, w.window, w.window // 2)

    def make_inputs(device: torch.device) -> tuple[Tensor, ...]:
        # Scores q k^T of a standard deviation of one.
        return (w.normal(device, B, t, HW, 3 * C, scale=(C // w.heads) ** -0.25),)

    def run(inputs: Sequence[Tensor], config: AttentionConfig) -> Sequence[Tensor]:
        launch(inputs[0], windows, w.heads, w.input_precision, config)
        return inputs

    return Tunable(
        problem(w.dtype, w.input_precision, w.crop_classes, HW, C, w.heads, w.window),
        candidates(w.capability, w.dtype, C // w.heads, w.window),
        make_inputs,
        run,
    )


def _constants(
    windows: Windows, C: int, heads: int, input_precision: str, config: AttentionConfig
) -> dict[str, Any]:
    # Two powers of two, 16 or more, that hold the N tokens of a window with little to spare: 144 = 128 + 16.
    tokens = windows.window**2
    keys = max(16, triton.next_power_of_2(tokens) // 2)
    return windows.constants() | {
        "HEADS": heads,
        "D": C // heads,
        "BLOCK_D": max(16, triton.next_power_of_2(C // heads)),
        "QUERIES": config.queries,
        "KEYS": keys,
        "REST": max(16, triton.next_power_of_2(tokens - keys)),
        "PRECISION": input_precision,
    }


def compile_targets(capability: int) -> list[CompileTarget]:
    """The kernel at the published sizes: C = 128, 4 heads, 24 x 24, window 12, shifted or not."""
    targets = []
    for dtype, precision in [*((dtype, "ieee") for dtype in DTYPES), (torch.float32, "tf32x3")]:
        config, name = default_config(capability, dtype, 32, 12), DTYPES[dtype]
        targets += [
            CompileTarget(
                name=f"{name} {precision} shift {shift}",
                kernel=attention_kernel,
                signature={"qkv_ptr": f"*{name}"},
                constexprs=_constants(Windows(24, 24, 12, shift), 128, 4, precision, config),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                maxnreg=config.maxnreg,
                expects_mma=None if (name, precision) == ("fp32", "ieee") else "mma",
            )
            for shift in (0, 6)
        ]
    return targets
