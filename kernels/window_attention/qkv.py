"""Queries, keys and values of a window-attention block, with the image's guidance.

    q, k, v = norm(x) W^T + (g_q, g_k, 0)

for x `[B, t, HW, C]` in image order, norm without affine part, and guidance g that is the same for every
class. The result `[B, t, HW, 3C]` is in window order. Fused: cyclic shift and window partition (index
arithmetic), norm and addition; norm(x) and `[x ; guidance]` `[B, t, HW, C + G]` are never written to memory.
A program holds a tile of W and of g, and takes its tokens of one class after another.
"""

from __future__ import annotations

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


@triton.jit(do_not_specialize=["classes"])
def qkv_kernel(
    x_ptr,  # [B, t, HW, C], image order, strided over B and t
    weight_ptr,  # [3C, C]
    guidance_ptr,  # [B or 1, HW or 1, 2C], window order, strided over the first two
    qkv_ptr,  # [B, t, HW, 3C], window order
    classes,  # t
    x_stride_b,
    x_stride_t,
    guidance_stride_b,
    guidance_stride_n,
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = qkv_ptr.dtype.element_ty
    groups = tl.cdiv(classes, CLASSES)
    b = (tl.program_id(2) // groups).to(tl.int64)
    first = (tl.program_id(2) % groups * CLASSES).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    c = tl.arange(0, BLOCK_C)
    valid = (row < H * W)[:, None]
    mask = valid & (channel < C)[None, :]

    mask_weight = (c < C)[:, None] & (channel < C)[None, :]
    weight_ptr += channel[None, :] * C + c[:, None]
    weight_q = tl.load(weight_ptr, mask_weight, 0.0)
    weight_k = tl.load(weight_ptr + C * C, mask_weight, 0.0)
    weight_v = tl.load(weight_ptr + 2 * C * C, mask_weight, 0.0)
    guidance_ptr += b * guidance_stride_b + row[:, None] * guidance_stride_n + channel[None, :]
    guidance_q = tl.load(guidance_ptr, mask, 0.0)
    guidance_k = tl.load(guidance_ptr + C, mask, 0.0)

    x_ptr += b * x_stride_b + token_position(row, H, W, WINDOW, SHIFT)[:, None] * C + c[None, :]
    qkv_ptr += b * classes * (H * W * 3 * C) + row[:, None] * (3 * C) + channel[None, :]
    for i in range(first, tl.minimum(first + CLASSES, classes)):
        x = tl.load(x_ptr + i * x_stride_t, valid & (c < C)[None, :], 0.0).to(tl.float32)
        x = normalise(x, C, BLOCK_C).to(dtype)
        q = tl.dot(x, weight_q, input_precision=PRECISION) + guidance_q.to(tl.float32)
        k = tl.dot(x, weight_k, input_precision=PRECISION) + guidance_k.to(tl.float32)
        v = tl.dot(x, weight_v, input_precision=PRECISION)
        p_qkv = qkv_ptr + i * (H * W * 3 * C)
        tl.store(p_qkv, q.to(dtype), mask)
        tl.store(p_qkv + C, k.to(dtype), mask)
        tl.store(p_qkv + 2 * C, v.to(dtype), mask)


@dataclass(frozen=True)
class QKVConfig(LaunchConfig):
    """Launch config: tokens and classes per program, and its channels of each of q, k and v."""

    rows: int
    channels: int
    classes: int
    num_warps: int
    num_stages: int


@cache
def default_config(capability: int, problem: Problem) -> QKVConfig:
    """Return a config that fits every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
    if problem.dtype == "fp32":
        num_warps, num_stages = (8, 1) if problem.precision == "ieee" else (4, 2)
        return QKVConfig(32, 16, 8, num_warps, num_stages)
    if _is_narrow(capability, problem):
        return QKVConfig(32, 32, 8, num_warps=4, num_stages=2)
    return QKVConfig(64, 128, 8, num_warps=8, num_stages=2)


def candidates(capability: int, problem: Problem) -> tuple[QKVConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
        return default_first(
            default, grid(default, rows=(16, 32, 64), channels=(16, 32), num_warps=(4, 8), num_stages=(1, 2))
        )
    if _is_narrow(capability, problem):
        tiles = [(32, 32, 4), (64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)]
    else:
        tiles = [(64, 32, 4), (64, 64, 4), (64, 128, 8), (128, 32, 4), (128, 64, 8)]
    others = [
        replace(tiled, rows=rows, channels=width, num_warps=num_warps)
        for rows, width, num_warps in tiles
        for tiled in grid(default, classes=(4, 8, 16), num_stages=(2, 3))
    ]
    return default_first(default, others)


def interpreter_config(problem: Problem) -> QKVConfig:
    """Few and large programs."""
    return QKVConfig(rows=512, channels=256, classes=1024, num_warps=4, num_stages=1)


def _is_narrow(capability: int, problem: Problem) -> bool:
    """Whether the tile of weights must be small: of many channels, or with 99 KB of shared memory."""
    return problem.size("channels") > 128 or capability in (86, 89)


def problem(x: Tensor, *_: object, input_precision: str) -> Problem:
    """What a measured config is found by."""
    sizes = {"positions": x.shape[2], "channels": x.shape[3]}
    return Problem.of("window_block", "qkv", QKVConfig, x, input_precision, **sizes)


def launch(
    x: Tensor,
    weight: Tensor,
    query_key: Tensor,
    windows: Windows,
    *,
    input_precision: str,
    config: QKVConfig,
) -> Tensor:
    """`[B, t, HW, 3C]` from `x [B, t, HW, C]`, `weight [3C, C]` and `query_key [B or 1, HW or 1, 2C]`."""
    B, t, HW, C = x.shape
    guidance = query_key.expand(B, HW, 2 * C)
    qkv = x.new_empty((B, t, HW, 3 * C))
    grid = (triton.cdiv(C, config.channels), triton.cdiv(HW, config.rows), B * triton.cdiv(t, config.classes))
    launcher.run(
        qkv_kernel, grid,
        x, weight, guidance, qkv, t, x.stride(0), x.stride(1), guidance.stride(0), guidance.stride(1),
        **windows.constants(), C=C, BLOCK_C=triton.next_power_of_2(C), ROWS=config.rows,
        CHANNELS=config.channels, CLASSES=config.classes, PRECISION=input_precision, config=config,
    )  # fmt: skip
    return qkv


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
