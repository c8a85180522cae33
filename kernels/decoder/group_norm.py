"""Group normalisation from parts: the statistics that a convolution's tiles leave, to a scale and a shift.

A part i of an image holds, for each channel, the sum s_i of its n_i pixels and the sum of squared deviations
m_i from their mean. Over a group's parts and channels, n values together (Chan, Golub and LeVeque, 1979):

    mean = sum s_i / n        variance = sum (m_i + n_i (s_i / n_i - mean)^2) / n
    scale = weight / sqrt(variance + eps)        shift = bias - mean scale

so that scale x + shift is the normalised x. The next kernel applies it while it reads x; no normalised map is
stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.convolution import Size, norm_dtype
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig


@triton.jit
def merge_kernel(
    statistics_ptr,  # [N, tiles*PHASES, 2, C] fp32: sum and squared deviations
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [N, 2, C], output: scale and shift
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    HW: tl.constexpr,  # pixels of an image in each phase
    PHASES: tl.constexpr,
    PIXELS: tl.constexpr,  # pixels of a part; the last one of an image may have fewer
    BLOCK_G: tl.constexpr,  # channels of a group, rounded up
    PARTS: tl.constexpr,  # parts per step
):
    WIDTH: tl.constexpr = C // GROUPS
    COUNT: tl.constexpr = (HW + PIXELS - 1) // PIXELS * PHASES
    image = (tl.program_id(0) // GROUPS).to(tl.int64)
    o_c = tl.arange(0, BLOCK_G)
    m_c = o_c < WIDTH
    channel = tl.program_id(0) % GROUPS * WIDTH + o_c
    p_sum = statistics_ptr + image * (COUNT * 2 * C) + channel[None, :]

    total = tl.zeros((PARTS, BLOCK_G), tl.float32)
    for start in range(0, COUNT, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        total += tl.load(p_sum + part * (2 * C), mask=(part < COUNT) & m_c[None, :], other=0.0)
    mean = tl.sum(total) / (HW * PHASES * WIDTH)

    squares = tl.zeros((PARTS, BLOCK_G), tl.float32)
    for start in range(0, COUNT, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        m = (part < COUNT) & m_c[None, :]
        sums = tl.load(p_sum + part * (2 * C), mask=m, other=0.0)
        inner = tl.load(p_sum + part * (2 * C) + C, mask=m, other=0.0)
        pixels = tl.maximum(tl.minimum(HW - part // PHASES * PIXELS, PIXELS), 1)
        apart = sums / pixels - mean
        squares += tl.where(m, inner + pixels * apart * apart, 0.0)
    variance = tl.sum(squares) / (HW * PHASES * WIDTH)

    weight = tl.load(weight_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
    scale = weight * tl.rsqrt(variance + eps)
    p_out = out_ptr + image * (2 * C) + channel
    tl.store(p_out, scale, mask=m_c)
    tl.store(p_out + C, bias - mean * scale, mask=m_c)


@dataclass(frozen=True)
class MergeConfig(LaunchConfig):
    """Launch config: parts per step."""

    parts: int = 64
    num_warps: int = 4


def launch(
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    size: Size,
    pixels: int,
    config: MergeConfig = MergeConfig(),
) -> Tensor:
    """Scale and shift `[N, 2, C]` for the output of a convolution of a size. Arguments are not checked.

    Args:
        statistics: the convolution's, `[N, parts, 2, C]`.
        weight: `[C]`.
        bias: `[C]`.
        pixels: of a part, as the convolution's config has them.
    """
    N, C = len(statistics), size.channels_out
    out = statistics.new_empty((N, 2, C), dtype=norm_dtype(weight.dtype))
    launcher.run(
        merge_kernel, (N * groups,), statistics, weight, bias, out, eps,
        C=C, GROUPS=groups, HW=size.pixels, PHASES=size.phases, PIXELS=pixels,
        BLOCK_G=triton.next_power_of_2(C // groups), PARTS=config.parts, config=config,
    )  # fmt: skip
    return out
