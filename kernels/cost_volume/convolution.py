"""Convolution of a cost volume, channels last, as an implicit matrix product.

For maps `x [N, H, W, CI]` and K x K taps, zero outside the map:

    y[r, s] = bias + sum_ij  W[:, :, i, j] . x[r + i - K // 2, s + j - K // 2]

The sum over taps and channels is one matrix product. Its left operand, the patches, is gathered by index
arithmetic and never reaches memory.
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


@triton.jit(do_not_specialize=["images"])
def convolution_kernel(
    x_ptr,  # [N, H*W, CI]
    weight_ptr,  # [CO, TAPS*TAPS, CI]
    bias_ptr,  # [CO]
    out_ptr,  # [N, H*W, CO], output
    images,  # N
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # output channels
    DEPTH: tl.constexpr,  # taps x input channels per step
    PRECISION: tl.constexpr,
):
    HW: tl.constexpr = H * W
    PATCH: tl.constexpr = TAPS * TAPS * CI
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    image = (row // HW)[:, None].to(tl.int64)
    pixel = row % HW
    inside = row < images * HW
    p_x = x_ptr + image * (HW * CI)
    y = tl.where(inside, pixel // W, H + TAPS)[:, None]  # else a row without taps inside the map
    x = (pixel % W)[:, None]

    p_weight = weight_ptr + channel[:, None] * PATCH
    m_channel = channel < CO
    accumulator = tl.zeros((PIXELS, CHANNELS), tl.float32)
    # If the channels allow, a step has a single tap, whose offset is the same for the whole step.
    STEP_TAPS: tl.constexpr = 1 if CI % DEPTH == 0 else DEPTH
    for start in range(0, PATCH, DEPTH):
        k = start + tl.arange(0, DEPTH)
        tap = ((start + tl.arange(0, STEP_TAPS)) // CI)[None, :]
        dy = tap // TAPS - TAPS // 2
        dx = tap % TAPS - TAPS // 2
        m_map = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        o_patch = pixel[:, None] * CI + (dy * W + dx) * CI + (k % CI)[None, :]
        patch = tl.load(p_x + o_patch, mask=m_map, other=0.0, cache_modifier=".ca")
        # From PATCH on, the weights are zero.
        m_weight = m_channel[:, None] if PATCH % DEPTH == 0 else m_channel[:, None] & (k < PATCH)[None, :]
        weight = tl.load(p_weight + k[None, :], mask=m_weight, other=0.0)
        accumulator = tl.dot(patch, tl.trans(weight), accumulator, input_precision=PRECISION)

    bias = tl.load(bias_ptr + channel, mask=m_channel, other=0.0)
    accumulator += bias.to(tl.float32)[None, :]
    p_out = out_ptr + image * (HW * CO) + pixel[:, None] * CO
    tl.store(p_out + channel[None, :], accumulator, mask=inside[:, None] & m_channel[None, :])


@dataclass(frozen=True)
class Size:
    """Sizes of a convolution; `height` and `width` are the maps', `taps` is K."""

    height: int
    width: int
    channels_in: int
    channels_out: int
    taps: int

    @property
    def pixels(self) -> int:
        """Pixels of a map."""
        return self.height * self.width


@dataclass(frozen=True)
class ConvolutionConfig(LaunchConfig):
    """Launch config: pixels and output channels per program, taps x input channels per step."""

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int


@cache
def default_config(capability: int, problem: Problem) -> ConvolutionConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    size = Size(**dict(problem.sizes))
    channels = min(max(16, triton.next_power_of_2(size.channels_out)), 128)
    if problem.dtype == "fp32":
        return ConvolutionConfig(64, channels, 32, num_warps=8 if channels == 128 else 4, num_stages=2)
    if channels == 128:
        pixels = 256 if capability >= 90 else 128
        return ConvolutionConfig(pixels, channels, 64, num_warps=8, num_stages=3)
    pixels = 64 if 0 < size.pixels % 128 <= 64 else 128
    depth = 32 if size.channels_in % 64 == 32 else 64
    return ConvolutionConfig(pixels, channels, depth, num_warps=4, num_stages=3)


@cache
def interpreter_config(problem: Problem) -> ConvolutionConfig:
    """Return large tiles: the interpreter takes as long for a small program as for a large one."""
    return replace(default_config(90, problem), pixels=1024, depth=256)


def candidates(capability: int, problem: Problem) -> tuple[ConvolutionConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
        others = grid(default, pixels=(32, 64, 128), depth=(16, 32), num_warps=(4, 8), num_stages=(1, 2))
    else:
        others = [
            replace(tiled, pixels=pixels, num_warps=num_warps)
            for pixels, num_warps in ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8))
            for tiled in grid(default, depth=(32, 64), num_stages=(2, 3))
        ]
    return default_first(default, [*others, *grid(default, num_stages=(1, 4))])


def problem(x: Tensor, weight: Tensor, bias: Tensor, size: Size, *, input_precision: str) -> Problem:
    """The sizes and types by which a measured config is found."""
    return Problem.of("embed_cost_volume", "convolution", ConvolutionConfig, x, input_precision, **vars(size))


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, size: Size, *, input_precision: str, config: ConvolutionConfig
) -> Tensor:
    """Convolve `x [B, t, H*W, CI]` to `[B, t, H*W, CO]`; arguments are not checked.

    Args:
        x: the maps, contiguous.
        weight: `[CO, K, K, CI]`, contiguous.
        bias: `[CO]`.
        size: the sizes.
        input_precision: precision of products of fp32 numbers.
        config: the launch config.
    """
    B, t = x.shape[:2]
    out = x.new_empty((B, t, size.pixels, size.channels_out))
    tiles = triton.cdiv(B * t * size.pixels, config.pixels)
    launcher.run(
        convolution_kernel, (tiles, triton.cdiv(size.channels_out, config.channels)),
        x, weight, bias, out, B * t,
        H=size.height, W=size.width, CI=size.channels_in, CO=size.channels_out, TAPS=size.taps,
        PIXELS=config.pixels, CHANNELS=config.channels, DEPTH=config.depth, PRECISION=input_precision,
        config=config,
    )  # fmt: skip
    return out


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
