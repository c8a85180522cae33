"""Group normalisation from parts: the statistics that a convolution's tiles leave, to a scale and a shift.

A part i of an image holds, for each channel, the sum s_i of its n_i pixels and the sum of squared deviations
m_i from their mean. Over a group's parts and channels, n values together (Chan, Golub and LeVeque, 1979):

    mean = sum s_i / n        variance = sum (m_i + n_i (s_i / n_i - mean)^2) / n
    scale = weight / sqrt(variance + eps)        shift = bias - mean scale

so that scale x + shift is the normalised x. The next kernel applies it while it reads x; no normalised map is
stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.convolution import Config, Size, norm_dtype
from catseg_fast.kernels.launch.checks import DTYPES
from catseg_fast.kernels.launch.compile_target import CompileTarget

PARTS = 64  # parts a step


@triton.jit
def merge_kernel(
    statistics_ptr,  # [N, tiles*PHASES, 2, C] fp32: sum and squared deviations
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [N, 2, C], output: scale and shift
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    PIXELS: tl.constexpr,  # of an image, in each phase
    PHASES: tl.constexpr,
    TILE: tl.constexpr,  # pixels of a part; the last one of an image may have fewer
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels of a group, rounded up
):
    WIDTH: tl.constexpr = C // GROUPS
    COUNT: tl.constexpr = (PIXELS + TILE - 1) // TILE * PHASES
    image = (tl.program_id(0) // GROUPS).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < WIDTH
    channel = tl.program_id(0) % GROUPS * WIDTH + o_c
    p_sum = statistics_ptr + image * (COUNT * 2 * C) + channel[None, :]

    total = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for start in range(0, COUNT, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS))[:, None]
        total += tl.load(p_sum + part * (2 * C), mask=(part < COUNT) & m_c[None, :], other=0.0)
    mean = tl.sum(total) / (PIXELS * PHASES * WIDTH)

    squares = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for start in range(0, COUNT, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS))[:, None]
        m = (part < COUNT) & m_c[None, :]
        sums = tl.load(p_sum + part * (2 * C), mask=m, other=0.0)
        inner = tl.load(p_sum + part * (2 * C) + C, mask=m, other=0.0)
        pixels = tl.maximum(tl.minimum(PIXELS - part // PHASES * TILE, TILE), 1)
        apart = sums / pixels - mean
        squares += tl.where(m, inner + pixels * apart * apart, 0.0)
    variance = tl.sum(squares) / (PIXELS * PHASES * WIDTH)

    weight = tl.load(weight_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
    scale = weight * tl.rsqrt(variance + eps)
    p_out = out_ptr + image * (2 * C) + channel
    tl.store(p_out, scale, mask=m_c)
    tl.store(p_out + C, bias - mean * scale, mask=m_c)


def launch(
    statistics: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, size: Size, config: Config
) -> Tensor:
    """Scale and shift `[N, 2, C]` for the output of a convolution of that size and config.

    Nothing is checked.

    Args:
        statistics: the convolution's, `[N, parts, 2, C]`.
        weight: `[C]`.
        bias: `[C]`.
    """
    out = statistics.new_empty((len(statistics), 2, size.channels_out), dtype=norm_dtype(weight.dtype))
    merge_kernel[(len(statistics) * groups,)](
        statistics,
        weight,
        bias,
        out,
        eps,
        **_constants(groups, size, config),
        num_warps=4,
    )
    return out


def compile_target(name: str, size: Size, dtype: torch.dtype, groups: int, config: Config) -> CompileTarget:
    """The kernel as `launch` starts it."""
    storage = f"*{DTYPES[dtype]}"
    return CompileTarget(
        name=f"{name} {DTYPES[dtype]}",
        kernel=merge_kernel,
        signature={
            "statistics_ptr": "*fp32",
            "weight_ptr": storage,
            "bias_ptr": storage,
            "out_ptr": f"*{DTYPES[norm_dtype(dtype)]}",
            "eps": "fp32",
        },
        constexprs=_constants(groups, size, config),
        num_warps=4,
        num_stages=3,
    )


def _constants(groups: int, size: Size, config: Config) -> dict[str, int]:
    return {
        "C": size.channels_out,
        "GROUPS": groups,
        "PIXELS": size.pixels,
        "PHASES": size.phases,
        "TILE": config.pixels,
        "BLOCK_PARTS": PARTS,
        "BLOCK_C": triton.next_power_of_2(size.channels_out // groups),
    }
