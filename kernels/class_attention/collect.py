"""First pass of the linear attention over classes: a chunk's part of the sums over all classes.

With phi(x) = elu(x) + 1, for each crop, position and head, over the chunk's classes t:

    n = LN(x);  k = phi(W_k n + b_k + text_key);  v = W_v n + b_v
    key_value += sum_t k_t v_t^T / length;  key_sum += sum_t k_t

x is `[B, t, HW, C]`, the sums are `[B, hw, heads, d, d]` and `[B, hw, heads, d]` in fp32, d = C / heads. With
pooling (h, w) a token is the average of h x w positions, taken while x is read. Normalised tokens, keys and
values never reach memory. Instead of `key_value`, the last chunk may write the input of `class_apply`: the
means of values `key_value_j length / key_sum_j` in the type of x.

A program holds the weights of some heads and walks over the classes of one position. Each sum is computed by
one program, without atomics, so results are bitwise reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.class_attention.tokens import feature_map, load_tokens
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.layer_norm import normalise
from catseg_fast.kernels.products import add_after


@triton.jit(do_not_specialize=["classes"])
def collect_kernel(
    x_ptr,  # [B, t, HW, C], strided over B, t and HW
    weight_ptr,  # [2C, C], keys then values
    bias_ptr,  # [2C]
    text_ptr,  # [B or 1, t, C], strided over the first two, or None
    old_key_value_ptr,  # [B, hw, heads, d, d] or [heads, d, d] fp32, or None
    old_key_sum_ptr,  # [B, hw, heads, d] or [heads, d] fp32, or None
    key_value_ptr,  # [B, hw, heads, d, d], output: fp32 sums, or means of values in the type of x
    key_sum_ptr,  # [B, hw, heads, d] fp32, output
    classes,  # t
    inverse_length,
    x_stride_b,
    x_stride_t,
    x_stride_p,
    text_stride_b,
    text_stride_t,
    H: tl.constexpr,
    W: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # d, rounded up
    OLD_IS_SHARED: tl.constexpr,  # all positions add to the same old sums
    MEANS: tl.constexpr,
    GROUP: tl.constexpr,  # heads per program
    BLOCK_GROUP: tl.constexpr,  # GROUP, rounded up
    CLASSES: tl.constexpr,  # classes per step
    PRECISION: tl.constexpr,
):
    D: tl.constexpr = C // HEADS
    HW: tl.constexpr = (H // POOL_H) * (W // POOL_W)
    CHANNELS: tl.constexpr = BLOCK_GROUP * BLOCK_D
    dtype = x_ptr.dtype.element_ty
    token = tl.program_id(0) // (HEADS // GROUP)
    first = tl.program_id(0) % (HEADS // GROUP) * (GROUP * D)
    b, p = (token // HW).to(tl.int64), token % HW

    o_c = tl.arange(0, BLOCK_C)
    o_g = tl.arange(0, CHANNELS)
    EVEN: tl.constexpr = (C == BLOCK_C) and (D == BLOCK_D) and (GROUP == BLOCK_GROUP)
    if EVEN:
        m_g = tl.full((CHANNELS,), True, tl.int1)
        channel = first + o_g
    else:
        m_g = (o_g // BLOCK_D < GROUP) & (o_g % BLOCK_D < D)
        channel = first + o_g // BLOCK_D * D + o_g % BLOCK_D
    m_weight = (o_c < C)[:, None] & m_g[None, :]
    p_weight = weight_ptr + channel[None, :] * C + o_c[:, None]
    w_k = tl.load(p_weight, m_weight, 0.0)
    w_v = tl.load(p_weight + C * C, m_weight, 0.0)
    b_k = tl.load(bias_ptr + channel, m_g, 0.0).to(tl.float32)
    b_v = tl.load(bias_ptr + C + channel, m_g, 0.0).to(tl.float32)

    key_value = tl.zeros((BLOCK_GROUP, BLOCK_D, BLOCK_D), tl.float32)
    key_sum = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, classes, CLASSES):
        o_t = start + tl.arange(0, CLASSES)
        m_t = o_t < classes
        p_x = x_ptr + b * x_stride_b + o_t.to(tl.int64) * x_stride_t
        x = load_tokens(p_x, p, m_t, x_stride_p, C, BLOCK_C, W, POOL_H, POOL_W)
        x = normalise(x, C, BLOCK_C).to(dtype)
        k = add_after(tl.dot(x, w_k, input_precision=PRECISION), b_k[None, :], dtype)
        m = m_t[:, None] & m_g[None, :]
        if text_ptr is not None:
            p_text = text_ptr + b * text_stride_b + o_t.to(tl.int64)[:, None] * text_stride_t
            k += tl.load(p_text + channel[None, :], m, 0.0).to(tl.float32)
        k = tl.where(m, feature_map(k), 0.0)
        v = add_after(tl.dot(x, w_v, input_precision=PRECISION), b_v[None, :], dtype)
        key_sum += tl.sum(k, 0)
        k = tl.reshape(k.to(dtype), (CLASSES, BLOCK_GROUP, BLOCK_D))
        v = tl.reshape(v.to(dtype), (CLASSES, BLOCK_GROUP, BLOCK_D))
        k, v = tl.permute(k, (1, 2, 0)), tl.permute(v, (1, 0, 2))
        key_value = tl.dot(k, v, key_value, input_precision=PRECISION)
    key_value *= inverse_length

    o_h = tl.arange(0, BLOCK_GROUP)[:, None, None]
    o_k, o_v = tl.arange(0, BLOCK_D)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    o_key_value = (first + o_h * D + o_k) * D + o_v
    m_key_value = (o_h < GROUP) & (o_k < D) & (o_v < D)
    if old_key_value_ptr is not None:
        old = token.to(tl.int64) * (0 if OLD_IS_SHARED else C)
        key_sum += tl.load(old_key_sum_ptr + old + channel, m_g, 0.0)
        key_value += tl.load(old_key_value_ptr + old * D + o_key_value, m_key_value, 0.0)
    new = token.to(tl.int64) * C
    tl.store(key_sum_ptr + new + channel, key_sum, m_g)
    if MEANS:
        mean_key = tl.maximum(key_sum * inverse_length, 1e-37)
        key_value /= tl.reshape(mean_key, (BLOCK_GROUP, BLOCK_D))[:, :, None]
    tl.store(key_value_ptr + new * D + o_key_value, key_value.to(key_value_ptr.dtype.element_ty), m_key_value)


@dataclass(frozen=True)
class CollectConfig(LaunchConfig):
    """Launch config: the most channels per program (in whole heads), and classes per step."""

    version: ClassVar[int] = 2
    channels: int
    classes: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@cache
def default_config(capability: int, problem: Problem) -> CollectConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    if problem.dtype == "fp32":
        return CollectConfig(channels=32, classes=16, num_warps=16, num_stages=1)
    if problem.size("channels") > 128:
        return CollectConfig(channels=32, classes=16, num_warps=4, num_stages=2)
    if capability in (86, 89):
        return CollectConfig(channels=64, classes=16, num_warps=4, num_stages=3)
    if capability < 90:
        return CollectConfig(channels=64, classes=32, num_warps=4, num_stages=2)
    return CollectConfig(channels=128, classes=32, num_warps=4, num_stages=3)


def candidates(capability: int, problem: Problem) -> tuple[CollectConfig, ...]:
    """Configs worth timing, the default first."""
    default = default_config(capability, problem)
    tiles = ((32, 4), (32, 8), (64, 8)) if problem.dtype == "fp32" else ((32, 4), (64, 4), (128, 4), (128, 8))
    others = [
        replace(tiled, channels=channels, num_warps=num_warps)
        for channels, num_warps in tiles
        for tiled in grid(default, classes=(16, 32, 64), num_stages=(2, 3))
    ]
    limited = grid(default, num_stages=(2, 3), maxnreg=(128, 168))
    return default_first(default, [*others, *grid(default, num_stages=(1, 4)), *limited])


def interpreter_config(problem: Problem) -> CollectConfig:
    """Return a config with few steps: the interpreter needs milliseconds for each, whatever its size."""
    return CollectConfig(channels=256, classes=32, num_warps=1, num_stages=1)


def problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    text_key: Tensor | None,
    key_value: Tensor | None,
    key_sum: Tensor | None,
    heads: int,
    length: int,
    resolution: Sequence[int],
    pooling: Sequence[int],
    means: bool,
    *,
    input_precision: str,
) -> Problem:
    """The sizes and types by which a measured config is found."""
    sizes = {"positions": x.shape[2], "channels": x.shape[3], "heads": heads}
    precision = _precision(input_precision)
    pooled = pooling[0] * pooling[1]
    return Problem.of("class_collect", "collect", CollectConfig, x, precision, **sizes, pooled=pooled)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    text_key: Tensor | None,
    key_value: Tensor | None,
    key_sum: Tensor | None,
    heads: int,
    length: int,
    resolution: Sequence[int],
    pooling: Sequence[int],
    means: bool,
    *,
    input_precision: str,
    config: CollectConfig,
) -> tuple[Tensor, Tensor]:
    """Return new sums `[B, hw, heads, d, d]` and `[B, hw, heads, d]` in fp32.

    The old sums, `key_value` and `key_sum`, have these shapes, or `[heads, …]` if they are the same at every
    position, or are None. With `means`, the first result holds means in the type of x.
    """
    (B, t, _, C), d = x.shape, x.shape[-1] // heads
    (height, width), (pool_h, pool_w) = resolution, pooling
    positions = (height // pool_h) * (width // pool_w)
    new_key_value = x.new_empty((B, positions, heads, d, d), dtype=x.dtype if means else torch.float32)
    new_key_sum = x.new_empty((B, positions, heads, d), dtype=torch.float32)
    group = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * d <= config.channels))
    launcher.run(
        collect_kernel, (B * positions * (heads // group),),
        x, weight, bias, text_key, key_value, key_sum, new_key_value, new_key_sum,
        t, 1 / length, *x.stride()[:3],
        *(text_key.expand(B, -1, -1).stride()[:2] if text_key is not None else (0, 0)),
        H=height, W=width, POOL_H=pool_h, POOL_W=pool_w,
        C=C, BLOCK_C=max(16, triton.next_power_of_2(C)),
        HEADS=heads, BLOCK_D=max(16, triton.next_power_of_2(d)),
        OLD_IS_SHARED=key_sum is not None and key_sum.ndim == 2, MEANS=means,
        GROUP=group, BLOCK_GROUP=triton.next_power_of_2(group), CLASSES=config.classes,
        PRECISION=_precision(input_precision), config=config,
    )  # fmt: skip
    return new_key_value, new_key_sum


def _precision(input_precision: str) -> str:
    return "ieee" if input_precision == "tf32x3" else input_precision  # split weights would spill


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
