"""Queries, keys and values of a window-attention block, with the image's guidance.

    q, k, v = norm(x) W^T + (g_q, g_k, 0)

for x `[B, t, HW, C]`, norm without affine parameters, and guidance g that is the same for every class. The
result is `[B, t, HW, 3C]`, in image order like x. The norm and the addition are fused: norm(x) and
`[x ; guidance] [B, t, HW, C + G]` are never written to memory. A program holds a tile of W and of g, and
computes its tokens class by class.

With `tma`, x is read and the result is written through tensor descriptors made on the host, which need no
allocation. On GPUs below compute capability 9.0, which have no descriptors, the kernel uses pointers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.descriptors import describe, fits
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.layer_norm import normalise
from catseg_fast.kernels.products import add_after


@triton.jit(do_not_specialize=["classes"])
def qkv_kernel(
    x,  # [B, t, HW, C], strided over B and t: a pointer, or with TMA a descriptor
    weight_ptr,  # [3C, C]
    guidance_ptr,  # [B or 1, HW or 1, 2C], strided over the first two
    qkv,  # [B, t, HW, 3C], output: a pointer, or with TMA a descriptor of [B * t, HW, 3C]
    classes,  # t
    x_stride_b,
    x_stride_t,
    guidance_stride_b,
    guidance_stride_n,
    HW: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = weight_ptr.dtype.element_ty
    groups = tl.cdiv(classes, CLASSES)
    b = tl.program_id(2) // groups
    first = tl.program_id(2) % groups * CLASSES
    first_row = tl.program_id(1) * ROWS
    first_channel = tl.program_id(0) * CHANNELS
    row = first_row + tl.arange(0, ROWS)
    channel = first_channel + tl.arange(0, CHANNELS)
    c = tl.arange(0, BLOCK_C)
    m_row = (row < HW)[:, None]
    m = m_row & (channel < C)[None, :]

    m_weight = (c < C)[:, None] & (channel < C)[None, :]
    p_weight = weight_ptr + channel[None, :] * C + c[:, None]
    weight_q = tl.load(p_weight, m_weight, 0.0)
    weight_k = tl.load(p_weight + C * C, m_weight, 0.0)
    weight_v = tl.load(p_weight + 2 * C * C, m_weight, 0.0)
    p_guidance = guidance_ptr + b.to(tl.int64) * guidance_stride_b
    p_guidance += row[:, None] * guidance_stride_n + channel[None, :]
    guidance_q = tl.load(p_guidance, m, 0.0)
    guidance_k = tl.load(p_guidance + C, m, 0.0)

    for step in range(tl.minimum(classes - first, CLASSES)):
        i = first + step
        if TMA:
            tokens = x.load([b, i, first_row, 0]).reshape(ROWS, BLOCK_C)
        else:
            p_x = x + b.to(tl.int64) * x_stride_b + i.to(tl.int64) * x_stride_t
            tokens = tl.load(p_x + row[:, None] * C + c[None, :], m_row & (c < C)[None, :], 0.0)
        tokens = normalise(tokens.to(tl.float32), C, BLOCK_C).to(dtype)
        sample = b * classes + i
        q = tl.dot(tokens, weight_q, input_precision=PRECISION)
        q = add_after(q, guidance_q.to(tl.float32), dtype)
        _store(qkv, q.to(dtype), sample, first_row, first_channel, m, HW, 3 * C, TMA)
        k = tl.dot(tokens, weight_k, input_precision=PRECISION)
        k = add_after(k, guidance_k.to(tl.float32), dtype)
        _store(qkv, k.to(dtype), sample, first_row, C + first_channel, m, HW, 3 * C, TMA)
        v = tl.dot(tokens, weight_v, input_precision=PRECISION)
        _store(qkv, v.to(dtype), sample, first_row, 2 * C + first_channel, m, HW, 3 * C, TMA)


@triton.jit
def _store(
    out, x, sample, first_row, first_channel, m, HW: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr
):
    """Store a tile of `[samples, HW, WIDTH]`."""
    if TMA:
        out.store([sample, first_row, first_channel], x.reshape(1, x.shape[0], x.shape[1]))
    else:
        row = first_row + tl.arange(0, x.shape[0])[:, None]
        channel = first_channel + tl.arange(0, x.shape[1])[None, :]
        tl.store(out + sample.to(tl.int64) * (HW * WIDTH) + row * WIDTH + channel, x, m)


GROUPS = 65535  # of classes; CUDA launches no more programs along the third axis


@dataclass(frozen=True)
class QKVConfig(LaunchConfig):
    """Launch config: tokens, classes, and channels of each of q, k and v per program, and the memory access.

    `tma` needs compute capability 9.0 or higher. Sizes that do not fit a tensor descriptor use pointers.
    """

    version: ClassVar[int] = 2
    rows: int
    channels: int
    classes: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tma: bool = False


@cache
def default_config(capability: int, problem: Problem) -> QKVConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    if problem.dtype == "fp32":
        ieee = problem.precision == "ieee"
        rows, num_warps, num_stages = (16, 8, 1) if ieee else (32, 4, 2)
        return QKVConfig(rows, 16, 8, num_warps, num_stages)
    if _is_narrow(capability, problem):
        return QKVConfig(32, 32, 8, num_warps=4, num_stages=2)
    if capability < 90:
        return QKVConfig(64, 64, 8, num_warps=4, num_stages=2)
    return QKVConfig(64, 64, 8, num_warps=4, num_stages=3, tma=True)


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
        for tiled in grid(default, classes=(4, 8), num_stages=(2, 3))
    ]
    limited = grid(default, num_stages=(1, 2, 3), maxnreg=(128, 168))
    pointers = [replace(config, tma=False) for config in grid(default, num_stages=(2, 3))]
    return default_first(default, [*others, *limited, *pointers])


def interpreter_config(problem: Problem) -> QKVConfig:
    """Return a config with few, large programs."""
    return QKVConfig(rows=512, channels=256, classes=1024, num_warps=4, num_stages=1)


def _is_narrow(capability: int, problem: Problem) -> bool:
    """Check whether the tile of weights must be small: for many channels, or 99 KB of shared memory."""
    return problem.size("channels") > 128 or capability in (86, 89)


def problem(x: Tensor, *_: object, input_precision: str) -> Problem:
    """The sizes and types by which a measured config is found."""
    sizes = {"positions": x.shape[2], "channels": x.shape[3]}
    return Problem.of("window_block", "qkv", QKVConfig, x, input_precision, **sizes)


def launch(
    x: Tensor, weight: Tensor, query_key: Tensor, *, input_precision: str, config: QKVConfig
) -> Tensor:
    """Return `[B, t, HW, 3C]` from `x [B, t, HW, C]`, `weight [3C, C]`, `query_key [B or 1, HW or 1, 2C]`.

    The positions of x are dense; strides over B and t may be any.
    """
    B, t, HW, C = x.shape
    guidance = query_key.expand(B, HW, 2 * C)
    qkv = x.new_empty((B, t, HW, 3 * C))
    block_c = triton.next_power_of_2(C)
    block_x, block_qkv = (1, 1, config.rows, block_c), (1, config.rows, config.channels)
    tma = config.tma and C % config.channels == 0 and fits(x, block_x) and fits(qkv, block_qkv)
    source, target = x, qkv
    if tma:
        source, target = describe(x, block_x), describe(qkv.view(B * t, HW, 3 * C), block_qkv)
    classes = max(config.classes, triton.cdiv(t, max(1, GROUPS // B)))
    launcher.run(
        qkv_kernel,
        (triton.cdiv(C, config.channels), triton.cdiv(HW, config.rows), B * triton.cdiv(t, classes)),
        source, weight, guidance, target, t,
        *((0, 0) if tma else x.stride()[:2]), guidance.stride(0), guidance.stride(1),
        HW=HW, C=C, BLOCK_C=block_c, ROWS=config.rows, CHANNELS=config.channels, CLASSES=classes,
        TMA=tma, PRECISION=input_precision, config=config,
    )  # fmt: skip
    return qkv


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
