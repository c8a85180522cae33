"""Projection, residual, LayerNorm, MLP, residual: the second half of a window-attention block.

    y = x + a W_p^T + b_p
    z = y + GELU(norm(y) W_1^T + b_1) W_2^T + b_2

for C channels and M hidden ones, norm without affine part. Tokens `a` come in window order, `x` and `z` are
in image order: the cyclic shift back and the merging of windows are index arithmetic. A program makes `rows`
tokens of z; y, norm(y) and the hidden layer `[B, t, HW, M]` are never written to memory.

GELU is exact for fp32. For 16-bit types it is `v * sigmoid(v * p(v^2))`, p fitted to a largest absolute error
of 2.6e-5, which is below the rounding of a hidden value of 0.06 and more in fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.layer_norm import normalise
from catseg_fast.kernels.window_attention.windows import Windows, token_position


@triton.jit
def gelu(v, EXACT: tl.constexpr):
    if EXACT:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    else:
        s = tl.minimum(v * v, 64.0)  # behind 8, p would turn back
        p = (0.0010142711 * s - 0.10677621) * s - 2.3011117  # -2 log2(e) times the polynomial
        r = tl.rsqrt(1.0 + tl.exp2(v * p))  # its square is the sigmoid, and cheaper than a division
        return v * r * r


@triton.jit(do_not_specialize=["tokens", "classes"])
def project_mlp_kernel(
    x_ptr,  # [B, t, HW, C], image order, strided over B and t
    qkv_ptr,  # [B, t, HW, 3C], window order; the first C channels are attended values
    proj_ptr,  # [C, C]
    proj_bias_ptr,  # [C]
    fc1_ptr,  # [M, C]
    fc1_bias_ptr,  # [M]
    fc2_ptr,  # [C, M]
    fc2_bias_ptr,  # [C]
    out_ptr,  # [B, t, HW, C], image order
    tokens,  # B * t * HW
    classes,  # t
    x_stride_b,
    x_stride_t,
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    mask = (row < tokens)[:, None] & inside[None, :]
    sample = row // (H * W)  # of B * t
    position = token_position(row % (H * W), H, W, WINDOW, SHIFT)

    qkv_ptr += row.to(tl.int64)[:, None] * (3 * C)
    y = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for k in range(0, C, HIDDEN):
        h = k + tl.arange(0, HIDDEN)
        attended = tl.load(qkv_ptr + h[None, :], (row < tokens)[:, None] & (h < C)[None, :], 0.0)
        proj = tl.load(proj_ptr + c[:, None] * C + h[None, :], inside[:, None] & (h < C)[None, :], 0.0)
        y = tl.dot(attended, tl.trans(proj), y, input_precision=PRECISION)
    start = (sample // classes).to(tl.int64) * x_stride_b + (sample % classes).to(tl.int64) * x_stride_t
    x = tl.load(x_ptr + (start + position * C)[:, None] + c[None, :], mask, 0.0)
    y += x.to(tl.float32) + tl.load(proj_bias_ptr + c, inside, 0.0).to(tl.float32)[None, :]
    normalised = normalise(y, C, BLOCK_C).to(dtype)
    y += tl.load(fc2_bias_ptr + c, inside, 0.0).to(tl.float32)[None, :]
    # In fp32, the sum is apart from the larger number that it is added to, which would round each step.
    APART: tl.constexpr = dtype == tl.float32
    z = tl.zeros_like(y) if APART else y
    for m in range(0, M, HIDDEN):
        h = m + tl.arange(0, HIDDEN)
        fc1 = tl.load(fc1_ptr + h[:, None] * C + c[None, :], (h < M)[:, None] & inside[None, :], 0.0)
        fc2 = tl.load(fc2_ptr + c[:, None] * M + h[None, :], inside[:, None] & (h < M)[None, :], 0.0)
        hidden = tl.dot(normalised, tl.trans(fc1), input_precision=PRECISION)
        hidden += tl.load(fc1_bias_ptr + h, h < M, 0.0).to(tl.float32)[None, :]
        hidden = gelu(hidden, dtype == tl.float32).to(dtype)
        z = tl.dot(hidden, tl.trans(fc2), z, input_precision=PRECISION)
    if APART:
        z += y
    out = sample.to(tl.int64) * (H * W * C) + position * C
    tl.store(out_ptr + out[:, None] + c[None, :], z.to(dtype), mask)


@dataclass(frozen=True)
class MLPConfig(LaunchConfig):
    """Launch config: tokens per program, hidden channels per step."""

    rows: int
    hidden: int
    num_warps: int
    num_stages: int


@cache
def default_config(capability: int, problem: Problem) -> MLPConfig:
    """Return a config that fits every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
    if problem.dtype == "fp32":
        return MLPConfig(rows=16, hidden=16, num_warps=8, num_stages=1)
    if problem.size("channels") > 128:
        return MLPConfig(rows=32, hidden=32, num_warps=4, num_stages=2)
    return MLPConfig(rows=128, hidden=64 if capability >= 90 else 32, num_warps=8, num_stages=2)


def candidates(capability: int, problem: Problem) -> tuple[MLPConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
        return default_first(
            default, grid(default, rows=(16, 32, 64), hidden=(16, 32), num_warps=(4, 8), num_stages=(1, 2))
        )
    others = [
        replace(tiled, rows=rows, num_warps=num_warps)
        for rows, num_warps in ((32, 4), (64, 4), (64, 8), (128, 8), (256, 8))
        for tiled in grid(default, hidden=(32, 64), num_stages=(2, 3))
    ]
    wide = grid(default, rows=(64, 128), hidden=(128,), num_warps=(8,))
    return default_first(default, [*others, *wide, *grid(default, num_stages=(1, 4))])


def interpreter_config(problem: Problem) -> MLPConfig:
    """Few and large programs."""
    return MLPConfig(rows=1024, hidden=128, num_warps=4, num_stages=1)


def problem(
    x: Tensor, qkv: Tensor, weights: Sequence[Tensor], windows: Windows, *, input_precision: str
) -> Problem:
    """What a measured config is found by."""
    sizes = {"positions": x.shape[2], "channels": x.shape[3], "hidden": len(weights[2])}
    return Problem.of("window_block", "mlp", MLPConfig, x, input_precision, **sizes)


def launch(
    x: Tensor,
    qkv: Tensor,
    weights: Sequence[Tensor],
    windows: Windows,
    *,
    input_precision: str,
    config: MLPConfig,
) -> Tensor:
    """`[B, t, HW, C]` from `x` of that shape and `qkv [B, t, HW, 3C]`, whose first C channels are used.

    `weights` are those of the projection, of the first and of the second layer, each with its bias.
    """
    B, t, HW, C = x.shape
    out = x.new_empty((B, t, HW, C))
    tokens = B * t * HW
    launcher.run(
        project_mlp_kernel, (triton.cdiv(tokens, config.rows),),
        x, qkv, *weights, out, tokens, t, x.stride(0), x.stride(1),
        **windows.constants(), C=C, BLOCK_C=triton.next_power_of_2(C), M=len(weights[2]),
        ROWS=config.rows, HIDDEN=config.hidden, PRECISION=input_precision, config=config,
    )  # fmt: skip
    return out


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
