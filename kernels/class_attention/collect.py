"""First pass of the linear attention over classes: a chunk's share of what it sums over all classes.

With phi(x) = elu(x) + 1, for each crop, position and head, over the chunk's classes t:

    n = LN(x);  k = phi(W_k n + b_k + text_key);  v = W_v n + b_v
    key_value += sum_t k_t v_t^T / length;  key_sum += sum_t k_t

x is `[B, t, HW, C]`, the sums are `[B, hw, heads, d, d]` and `[B, hw, heads, d]` in fp32, d = C / heads. With
pooling (h, w) a token is the average of h x w positions, taken while x is read. Normalised tokens, keys and
values never reach memory. A program holds the weights of some heads and walks over positions, and over
classes at each: every sum has one owner, there are no atomics, and the bits are the same every time. Keys and
values are made channels first, so that the weights' rows fill a matrix instruction however few the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.class_attention.tokens import load_matrix, load_tokens
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.layer_norm import normalise


@triton.jit(do_not_specialize=["classes", "tokens"])
def collect_kernel(
    x_ptr,  # [B, t, HW, C]
    weight_ptr,  # [2C, C], keys then values
    bias_ptr,  # [2C]
    text_ptr,  # [B or 1, t, C], or None
    old_key_value_ptr,  # [B, hw, heads, d, d] or [heads, d, d] fp32, or None
    old_key_sum_ptr,  # [B, hw, heads, d] or [heads, d] fp32, or None
    key_value_ptr,  # [B, hw, heads, d, d] fp32, output
    key_sum_ptr,  # [B, hw, heads, d] fp32, output
    classes,  # t
    tokens,  # B * hw
    inverse_length,
    x_stride_b,
    x_stride_t,
    x_stride_p,
    text_stride_b,
    text_stride_t,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    OLD_IS_SHARED: tl.constexpr,  # all positions add to the same old sums
    GROUP: tl.constexpr,  # heads per program
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,  # channels of GROUP heads, rounded up
    POSITIONS: tl.constexpr,  # positions per program, one after another
    CLASSES: tl.constexpr,  # classes per step
    PRECISION: tl.constexpr,
):
    D: tl.constexpr = C // HEADS
    HW: tl.constexpr = (H // POOL_H) * (W // POOL_W)
    dtype = x_ptr.dtype.element_ty
    group = tl.program_id(0) % (HEADS // GROUP)
    first = tl.program_id(0) // (HEADS // GROUP) * POSITIONS

    o_c = tl.arange(0, BLOCK_C)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < GROUP * D
    channel = group * (GROUP * D) + o_g
    EVEN: tl.constexpr = (C == BLOCK_C) and (GROUP * D == BLOCK_G)
    w_k = load_matrix(weight_ptr, channel, o_c, C, 2 * C, C, EVEN)
    w_v = load_matrix(weight_ptr + C * C, channel, o_c, C, C, C, EVEN)
    b_k = tl.load(bias_ptr + channel, mask=m_g, other=0.0).to(tl.float32)
    b_v = tl.load(bias_ptr + C + channel, mask=m_g, other=0.0).to(tl.float32)

    for i in range(POSITIONS):
        token = tl.minimum(first + i, tokens - 1)  # the last program may do the last position twice
        b, p = (token // HW).to(tl.int64), token % HW
        key_value = tl.zeros((BLOCK_G, BLOCK_G), tl.float32)
        key_sum = tl.zeros((BLOCK_G,), tl.float32)
        for start in range(0, classes, CLASSES):
            o_t = start + tl.arange(0, CLASSES)
            m_t = o_t < classes
            p_x = x_ptr + b * x_stride_b + o_t.to(tl.int64) * x_stride_t
            x = load_tokens(p_x, p, m_t, x_stride_p, C, BLOCK_C, W, POOL_H, POOL_W)
            x = tl.trans(normalise(x, C, BLOCK_C).to(dtype))
            k = tl.dot(w_k, x, input_precision=PRECISION) + b_k[:, None]
            m = m_g[:, None] & m_t[None, :]
            if text_ptr is not None:
                p_text = text_ptr + b * text_stride_b + o_t.to(tl.int64) * text_stride_t
                k += tl.load(p_text[None, :] + channel[:, None], mask=m, other=0.0).to(tl.float32)
            k = tl.where(m, tl.where(k > 0, k + 1.0, tl.exp(tl.minimum(k, 0.0))), 0.0)
            v = tl.dot(w_v, x, input_precision=PRECISION) + b_v[:, None]
            key_sum += tl.sum(k, 1)
            key_value = tl.dot(k.to(dtype), tl.trans(v.to(dtype)), key_value, input_precision=PRECISION)
        key_value *= inverse_length

        # Of the product of all channels with all, the heads' own blocks on the diagonal count.
        o_key_value = channel[:, None] * D + (o_g % D)[None, :]
        m_key_value = m_g[:, None] & m_g[None, :] & ((o_g // D)[:, None] == (o_g // D)[None, :])
        if old_key_value_ptr is not None:
            old = token.to(tl.int64) * (0 if OLD_IS_SHARED else C)
            key_sum += tl.load(old_key_sum_ptr + old + channel, mask=m_g, other=0.0)
            key_value += tl.load(old_key_value_ptr + old * D + o_key_value, mask=m_key_value, other=0.0)
        new = token.to(tl.int64) * C
        tl.store(key_sum_ptr + new + channel, key_sum, mask=m_g)
        tl.store(key_value_ptr + new * D + o_key_value, key_value, mask=m_key_value)


@dataclass(frozen=True)
class CollectConfig(LaunchConfig):
    """Launch config: channels per program at most (whole heads), its positions, and classes per step."""

    channels: int
    positions: int
    classes: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@cache
def default_config(capability: int, problem: Problem) -> CollectConfig:
    """Return a config that fits every GPU, at the published sizes and smaller ones."""
    if problem.dtype == "fp32":
        return CollectConfig(channels=32, positions=8, classes=16, num_warps=8, num_stages=1)
    return CollectConfig(channels=64, positions=8, classes=32, num_warps=4, num_stages=2, maxnreg=255)


def interpreter_config(problem: Problem) -> CollectConfig:
    """Few steps: each takes the interpreter milliseconds, however large it is."""
    return CollectConfig(channels=256, positions=64, classes=32, num_warps=1, num_stages=1)


def candidates(capability: int, problem: Problem) -> tuple[CollectConfig, ...]:
    """Configs worth timing, the default first; the same for all compute capabilities."""
    default = default_config(capability, problem)
    tiles = ((32, 4), (32, 8), (64, 8)) if problem.dtype == "fp32" else ((32, 4), (64, 4), (64, 8), (128, 8))
    others = [
        replace(tiled, channels=channels, num_warps=num_warps)
        for channels, num_warps in tiles
        for tiled in grid(default, classes=(16, 32, 64))
    ]
    return default_first(default, [*others, *grid(default, positions=(4, 8, 16), num_stages=(1, 2, 3))])


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
    *,
    input_precision: str,
) -> Problem:
    """What a measured config is found by."""
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
    *,
    input_precision: str,
    config: CollectConfig,
) -> tuple[Tensor, Tensor]:
    """New sums `[B, hw, heads, d, d]` and `[B, hw, heads, d]` in fp32.

    The old ones, `key_value` and `key_sum`, are like them, or `[heads, …]` and the same everywhere, or None.
    """
    (B, t, _, C), d = x.shape, x.shape[-1] // heads
    (height, width), (pool_h, pool_w) = resolution, pooling
    positions = (height // pool_h) * (width // pool_w)
    new_key_value = x.new_empty((B, positions, heads, d, d), dtype=torch.float32)
    new_key_sum = x.new_empty((B, positions, heads, d), dtype=torch.float32)
    group = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * d <= config.channels))
    launcher.run(
        collect_kernel, (heads // group * triton.cdiv(B * positions, config.positions),),
        x, weight, bias, text_key, key_value, key_sum, new_key_value, new_key_sum,
        t, B * positions, 1 / length, *x.stride()[:3],
        *(text_key.expand(B, -1, -1).stride()[:2] if text_key is not None else (0, 0)),
        C=C, HEADS=heads, H=height, W=width, POOL_H=pool_h, POOL_W=pool_w,
        OLD_IS_SHARED=key_sum is not None and key_sum.ndim == 2, GROUP=group,
        BLOCK_C=max(16, triton.next_power_of_2(C)), BLOCK_G=max(16, triton.next_power_of_2(group * d)),
        POSITIONS=config.positions, CLASSES=config.classes, PRECISION=_precision(input_precision),
        config=config,
    )  # fmt: skip
    return new_key_value, new_key_sum


def _precision(input_precision: str) -> str:
    return "ieee" if input_precision == "tf32x3" else input_precision  # split weights would spill


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
