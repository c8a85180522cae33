"""Second half of a window-attention block: projection, residual, LayerNorm, MLP, residual.

    y = x + a W_p^T + b_p
    z = y + GELU(norm(y) W_1^T + b_1) W_2^T + b_2

for C channels and M hidden channels, with norm without affine parameters; a, x and z are in image order. A
program computes `rows` tokens of z; y, norm(y) and the hidden layer `[B, t, HW, M]` are never written to
memory.

GELU is exact for fp32. For 16-bit types it is `v * sigmoid(v * p(v^2))`, with p fitted to a largest absolute
error of 2.6e-5, less than the rounding of fp16 for hidden values of 0.06 and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.layer_norm import normalise
from catseg_fast.kernels.products import add_after


@triton.jit
def gelu(v, EXACT: tl.constexpr):
    if EXACT:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    else:
        s = tl.minimum(v * v, 64.0)  # beyond |v| = 8, p is not monotonic
        p = (0.0010142711 * s - 0.10677621) * s - 2.3011117  # -2 log2(e) times the polynomial
        r = tl.rsqrt(1.0 + tl.exp2(v * p))  # its square is the sigmoid, and cheaper than a division
        return v * r * r


@triton.jit(do_not_specialize=["tokens", "classes"])
def project_mlp_kernel(
    x_ptr,  # [B, t, HW, C], strided over B and t
    qkv_ptr,  # [B, t, HW, 3C]; the first C channels are attended values
    proj_ptr,  # [C, C]
    proj_bias_ptr,  # [C]
    fc1_ptr,  # [M, C]
    fc1_bias_ptr,  # [M]
    fc2_ptr,  # [C, M]
    fc2_bias_ptr,  # [C]
    out_ptr,  # [B, t, HW, C], output, strided over B and t; it may be x
    tokens,  # B * t * HW
    classes,  # t
    x_stride_b,
    x_stride_t,
    out_stride_b,
    out_stride_t,
    HW: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    if HW % ROWS == 0:  # all tokens belong to one sample
        m_row = tl.full((ROWS, 1), True, tl.int1)
        sample = first // HW
    else:
        m_row = (row < tokens)[:, None]
        sample = row // HW
    m_c = c < C
    m = m_row & m_c[None, :]
    b, i = (sample // classes).to(tl.int64), (sample % classes).to(tl.int64)
    o_row = (row - sample * HW)[:, None] * C + c[None, :]

    p_qkv = qkv_ptr + first.to(tl.int64) * (3 * C) + tl.arange(0, ROWS)[:, None] * (3 * C)
    y = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for k in range(0, C, HIDDEN):
        h = k + tl.arange(0, HIDDEN)
        attended = tl.load(p_qkv + h[None, :], m_row & (h < C)[None, :], 0.0)
        proj = tl.load(proj_ptr + c[:, None] * C + h[None, :], m_c[:, None] & (h < C)[None, :], 0.0)
        y = tl.dot(attended, tl.trans(proj), y, input_precision=PRECISION)
    p_x = x_ptr + _column(b * x_stride_b + i * x_stride_t) + o_row
    y += tl.load(p_x, m, 0.0).to(tl.float32)
    y += tl.load(proj_bias_ptr + c, m_c, 0.0).to(tl.float32)[None, :]
    normalised = normalise(y, C, BLOCK_C).to(dtype)
    y += tl.load(fc2_bias_ptr + c, m_c, 0.0).to(tl.float32)[None, :]
    # In fp32, a product is summed up before the larger addend is added, which would round each step.
    APART: tl.constexpr = dtype == tl.float32
    z = tl.zeros_like(y) if APART else y
    for k in range(0, M, HIDDEN):
        h = k + tl.arange(0, HIDDEN)
        fc1 = tl.load(fc1_ptr + h[:, None] * C + c[None, :], (h < M)[:, None] & m_c[None, :], 0.0)
        fc2 = tl.load(fc2_ptr + c[:, None] * M + h[None, :], m_c[:, None] & (h < M)[None, :], 0.0)
        hidden = tl.dot(normalised, tl.trans(fc1), input_precision=PRECISION)
        fc1_bias = tl.load(fc1_bias_ptr + h, h < M, 0.0).to(tl.float32)
        hidden = add_after(hidden, fc1_bias[None, :], dtype)
        hidden = gelu(hidden, dtype == tl.float32).to(dtype)
        z = tl.dot(hidden, tl.trans(fc2), z, input_precision=PRECISION)
    if APART:
        z += y
    p_out = out_ptr + _column(b * out_stride_b + i * out_stride_t) + o_row
    tl.store(p_out, z.to(dtype), m)


@triton.jit
def _column(x):
    """Return a vector as a column, and a number unchanged."""
    if len(x.shape) == 1:
        return x[:, None]
    else:
        return x


@dataclass(frozen=True)
class MLPConfig(LaunchConfig):
    """Launch config: tokens per program and hidden channels per step."""

    version: ClassVar[int] = 2
    rows: int
    hidden: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@cache
def default_config(capability: int, problem: Problem) -> MLPConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    if problem.dtype == "fp32":
        return MLPConfig(rows=16, hidden=16, num_warps=8, num_stages=1)
    if problem.size("channels") > 128:
        return MLPConfig(rows=32, hidden=32, num_warps=4, num_stages=2)
    if capability < 90:
        return MLPConfig(rows=64, hidden=32, num_warps=4, num_stages=2)
    # Three programs per multiprocessor; on capability 100, Triton 3.6 would spill.
    maxnreg = 168 if capability == 90 else None
    return MLPConfig(rows=64, hidden=32, num_warps=4, num_stages=3, maxnreg=maxnreg)


def candidates(capability: int, problem: Problem) -> tuple[MLPConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
        return default_first(
            default, grid(default, rows=(16, 32, 64), hidden=(16, 32), num_warps=(4, 8), num_stages=(1, 2))
        )
    others = [
        replace(tiled, rows=rows, num_warps=num_warps)
        for rows, num_warps in ((32, 4), (64, 4), (64, 8), (128, 8))
        for tiled in grid(default, hidden=(32, 64), num_stages=(2, 3), maxnreg=(None,))
    ]
    limited = grid(default, hidden=(32, 64), num_stages=(2, 3, 4), maxnreg=(128, 168))
    return default_first(default, [*others, *limited])


def interpreter_config(problem: Problem) -> MLPConfig:
    """Return a config with few, large programs."""
    return MLPConfig(rows=1024, hidden=128, num_warps=4, num_stages=1)


def problem(
    x: Tensor, qkv: Tensor, weights: Sequence[Tensor], *, input_precision: str, out: Tensor | None = None
) -> Problem:
    """The sizes and types by which a measured config is found."""
    sizes = {"positions": x.shape[2], "channels": x.shape[3], "hidden": len(weights[2])}
    return Problem.of("window_block", "mlp", MLPConfig, x, input_precision, **sizes)


def launch(
    x: Tensor,
    qkv: Tensor,
    weights: Sequence[Tensor],
    *,
    input_precision: str,
    config: MLPConfig,
    out: Tensor | None = None,
) -> Tensor:
    """Return `[B, t, HW, C]` from `x` of that shape and the first C channels of `qkv [B, t, HW, 3C]`.

    Args:
        x: tokens with dense positions, and any strides over B and t.
        qkv: contiguous.
        weights: weights of the projection and the MLP's two layers, each followed by its bias.
        input_precision: precision of products of fp32 numbers.
        config: the launch config.
        out: tensor for the result, with dense positions, and any strides over B and t; by default a new
            tensor. It may be x.
    """
    B, t, HW, C = x.shape
    out = x.new_empty((B, t, HW, C)) if out is None else out
    tokens = B * t * HW
    launcher.run(
        project_mlp_kernel, (triton.cdiv(tokens, config.rows),),
        x, qkv, *weights, out, tokens, t, *x.stride()[:2], *out.stride()[:2],
        HW=HW, C=C, BLOCK_C=triton.next_power_of_2(C), M=len(weights[2]),
        ROWS=config.rows, HIDDEN=config.hidden, PRECISION=input_precision, config=config,
    )  # fmt: skip
    return out


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
