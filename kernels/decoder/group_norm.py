"""Group normalisation from partial statistics: a convolution's statistics become a scale and a shift.

A part i of an image holds, for each channel, the sum s_i of its n_i pixels and the sum of squared deviations
m_i from their mean. Over a group's parts and channels, n values together (Chan, Golub and LeVeque, 1979):

    mean = sum s_i / n        variance = sum (m_i + n_i (s_i / n_i - mean)^2) / n
    scale = weight / sqrt(variance + eps)        shift = bias - mean scale

so that scale x + shift is the normalised x. The next kernel applies them while it reads x; no normalised map
is stored.

The kernel also writes the border of the map x, since it knows the sign of the scale: the border holds the
infinity for which relu(scale x + shift) is zero. A scale that is zero, or rounds to zero, would give NaN
there. It is replaced by the smallest number of its type (2^-24 in fp16, 2^-126 in fp32), which changes
scale x by less than the result is rounded: by at most 2^-24 |x| in fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.decoder.layers import Layer
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig


@triton.jit
def merge_kernel(
    statistics_ptr,  # [B*t, PARTS, 2, C] fp32: sum and squared deviations
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    norm_ptr,  # [B*t, 2, C], output: scale and shift
    map_ptr,  # [B*t, H+2, W+2, C], of which the border is written
    eps,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    PHASES: tl.constexpr,  # a phase's parts are PHASES apart; the last one may be smaller
    PART: tl.constexpr,  # pixels of a part
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,  # parts per step
    BLOCK_C: tl.constexpr,  # channels of a group, rounded up
    PIXELS: tl.constexpr,  # border pixels per step
):
    WIDTH: tl.constexpr = C // GROUPS
    COUNT: tl.constexpr = H * W * WIDTH
    image = (tl.program_id(0) // GROUPS).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    m_c = c < WIDTH
    channel = tl.program_id(0) % GROUPS * WIDTH + c
    p_sum = statistics_ptr + image * (PARTS * 2 * C) + channel[None, :]

    total = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for start in range(0, PARTS, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS))[:, None]
        total += tl.load(p_sum + part * (2 * C), mask=(part < PARTS) & m_c[None, :], other=0.0)
    mean = tl.sum(total) / COUNT

    squares = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for start in range(0, PARTS, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS))[:, None]
        m = (part < PARTS) & m_c[None, :]
        sums = tl.load(p_sum + part * (2 * C), mask=m, other=0.0)
        inner = tl.load(p_sum + part * (2 * C) + C, mask=m, other=0.0)
        pixels = tl.maximum(tl.minimum(H * W // PHASES - part // PHASES * PART, PART), 1)
        apart = sums / pixels - mean
        squares += tl.where(m, inner + pixels * apart * apart, 0.0)
    variance = tl.sum(squares) / COUNT

    dtype = norm_ptr.dtype.element_ty
    SMALLEST: tl.constexpr = 5.9604644775390625e-08 if dtype == tl.float16 else 1.1754943508222875e-38
    weight = tl.load(weight_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
    scale = weight * tl.rsqrt(variance + eps)
    shift = bias - mean * scale
    sign = tl.where(weight < 0, -1.0, 1.0)
    scale = tl.where(scale.to(dtype) == 0, sign * SMALLEST, scale)
    p_norm = norm_ptr + image * (2 * C) + channel
    tl.store(p_norm, scale.to(dtype), mask=m_c)
    tl.store(p_norm + C, shift.to(dtype), mask=m_c)

    # Order of border pixels: the first row, the last row, then the first and last pixel of each other row.
    ROW: tl.constexpr = W + 2
    BORDER: tl.constexpr = 2 * ROW + 2 * H
    value = tl.broadcast_to((sign * float("-inf"))[None, :], (PIXELS, BLOCK_C)).to(map_ptr.dtype.element_ty)
    p_map = map_ptr + image * ((H + 2) * ROW * C) + channel[None, :]
    for start in range(0, BORDER, PIXELS):
        at = start + tl.arange(0, PIXELS)
        side = at - 2 * ROW
        y = tl.where(side >= 0, 1 + side // 2, at // ROW * (H + 1))
        x = tl.where(side >= 0, side % 2 * (W + 1), at % ROW)
        m = (at < BORDER)[:, None] & m_c[None, :]
        tl.store(p_map + ((y * ROW + x) * C)[:, None], value, mask=m)


@dataclass(frozen=True)
class MergeConfig(LaunchConfig):
    """Launch config: parts and border pixels per step."""

    parts: int
    pixels: int
    num_warps: int


class GroupNorm(NamedTuple):
    """A group normalisation: `weight [C]`, `bias [C]`, the number of groups, and eps."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


def normalise_plainly(x: Tensor, norm: Tensor | None = None) -> Tensor:
    """Return a map with a border as the next layer reads it, all finite; without scale and shift, x."""
    if norm is None:
        return x
    scale, shift = norm[:, :, :, None, None].float().unbind(2)
    return torch.relu(x.float() * scale + shift)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of scale and shift, in which a map is normalised: fp16 for its packed arithmetic."""
    return torch.float16 if dtype == torch.float16 else torch.float32


def launch(x: Tensor, statistics: Tensor, part: int, group_norm: GroupNorm, layer: Layer) -> Tensor:
    """Return scale and shift `[B, t, 2, C]` of a layer's output, and write the output's border.

    Args:
        x: the output, `[B, t, S*H + 2, S*W + 2, C]`.
        statistics: `[B, t, parts, 2, C]`; the parts cover all pixels.
        part: pixels of a part.
        group_norm: the normalisation.
        layer: its sizes.
    """
    B, t, parts, _, C = statistics.shape
    height, width = layer.scale * layer.height, layer.scale * layer.width
    norm = statistics.new_empty((B, t, 2, C), dtype=norm_dtype(x.dtype))
    config = MergeConfig(min(64, max(4, triton.next_power_of_2(parts))), pixels=64, num_warps=4)
    launcher.run(
        merge_kernel, (B * t * group_norm.groups,),
        statistics, group_norm.weight, group_norm.bias, norm, x, group_norm.eps,
        H=height, W=width, C=C, GROUPS=group_norm.groups,
        PHASES=1 if parts * part == height * width else layer.phases, PART=part, PARTS=parts,
        BLOCK_PARTS=config.parts, BLOCK_C=triton.next_power_of_2(C // group_norm.groups),
        PIXELS=config.pixels, config=config,
    )  # fmt: skip
    return norm
