"""Convolution of channels-last maps as an implicit matrix product, with GroupNorm fused at both ends.

For maps `x [N, H, W, CI]`, K x K taps and an output S times as large (S = 1 or 2), output pixel
(S r + a, S s + b) is

    addend + sum_ij  W[a, b, :, i, j] . f(x[r + i + a - K // 2, s + j + b - K // 2])

with f the identity or relu(scale x + shift), and zero outside the map, that is, behind f. One kernel so
serves the 7x7 convolution of the cost volume (K = 7), a decoder stage's phase convolutions (K = 2, S = 2: a
transposed convolution and the 3x3 behind it), its 3x3 convolution, and the head (3x3 to one channel).

The sum over taps and channels is one matrix product whose left operand, the patches, is gathered by index
arithmetic. Patches, normalised maps, and sums without the addend never reach memory. As a by-product, each
tile of pixels leaves the sum and the squared deviations of its output channels (`group_norm.py` merges them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel


@triton.jit(do_not_specialize=["classes", "images"])
def convolution_kernel(
    x_ptr,  # [N, H*W, CI]; N images are crops of `classes` each
    weight_ptr,  # [SCALE*SCALE, CO, TAPS*TAPS, CI]
    addend_ptr,  # [B or 1, SCALE*H, SCALE*W, CO] if ADDEND_IS_MAP, [CO] if not, or None
    norm_ptr,  # [N, 2, CI], scale and shift, or None
    out_ptr,  # [N, SCALE*H, SCALE*W, CO], output
    statistics_ptr,  # [N, tiles*SCALE*SCALE, 2, CO] fp32, output: sum and squared deviations, or None
    classes,  # t
    images,  # N
    x_stride_b,
    x_stride_t,
    addend_stride_b,
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TAPS: tl.constexpr,
    SCALE: tl.constexpr,
    ADDEND_IS_MAP: tl.constexpr,
    BY_IMAGE: tl.constexpr,  # no tile holds pixels of two images; else x is contiguous
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # output channels
    DEPTH: tl.constexpr,  # taps x input channels per step
    PRECISION: tl.constexpr,
):
    HW: tl.constexpr = H * W
    PATCH: tl.constexpr = TAPS * TAPS * CI
    phase = tl.program_id(0) % (SCALE * SCALE)
    tile = tl.program_id(0) // (SCALE * SCALE)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if BY_IMAGE:
        TILES: tl.constexpr = (HW + PIXELS - 1) // PIXELS
        image = tile // TILES
        crop = (image // classes).to(tl.int64)
        pixel = tile % TILES * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < HW
        p_x = x_ptr + crop * x_stride_b + (image % classes).to(tl.int64) * x_stride_t
        image = image.to(tl.int64)
    else:
        row = tile * PIXELS + tl.arange(0, PIXELS)
        image = (row // HW)[:, None].to(tl.int64)
        pixel = row % HW
        inside = row < images * HW
        p_x = x_ptr + image * (HW * CI)
    y = tl.where(inside, pixel // W, H + TAPS)[:, None]  # a row that has no tap inside the map
    x = (pixel % W)[:, None]

    p_weight = weight_ptr + (phase * CO + channel)[:, None] * PATCH
    m_channel = channel < CO
    accumulator = tl.zeros((PIXELS, CHANNELS), tl.float32)
    # A step is of one tap where the channels allow, so that its place is the same for all of the step.
    STEP_TAPS: tl.constexpr = 1 if CI % DEPTH == 0 else DEPTH
    for start in range(0, PATCH, DEPTH):
        k = start + tl.arange(0, DEPTH)
        tap = ((start + tl.arange(0, STEP_TAPS)) // CI)[None, :]
        dy = tap // TAPS - TAPS // 2 + phase // SCALE
        dx = tap % TAPS - TAPS // 2 + phase % SCALE
        m_map = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        o_patch = pixel[:, None] * CI + (dy * W + dx) * CI + (k % CI)[None, :]
        patch = tl.load(p_x + o_patch, mask=m_map, other=0.0, cache_modifier=".ca")
        if norm_ptr is not None:
            p_norm = norm_ptr + image * (2 * CI) + (k % CI)[None, :]
            normalised = tl.fma(patch.to(norm_ptr.dtype.element_ty), tl.load(p_norm), tl.load(p_norm + CI))
            # ReLU, and zero outside the map. NaN must come through, for an overflow to be seen in the end.
            highest = tl.where(m_map, float("inf"), 0.0).to(normalised.dtype)
            lowest = tl.zeros((1, 1), normalised.dtype)
            positive = tl.maximum(normalised, lowest, propagate_nan=tl.PropagateNan.ALL)
            patch = tl.minimum(positive, highest, propagate_nan=tl.PropagateNan.ALL).to(
                x_ptr.dtype.element_ty
            )
        # From PATCH on, what is in the patch meets zeros.
        m_weight = m_channel[:, None] if PATCH % DEPTH == 0 else m_channel[:, None] & (k < PATCH)[None, :]
        weight = tl.load(p_weight + k[None, :], mask=m_weight, other=0.0)
        accumulator = tl.dot(patch, tl.trans(weight), accumulator, input_precision=PRECISION)

    m_out = inside[:, None] & m_channel[None, :]
    o_out = ((SCALE * y + phase // SCALE) * (SCALE * W) + SCALE * x + phase % SCALE) * CO + channel[None, :]
    if addend_ptr is not None:
        if ADDEND_IS_MAP:
            addend = tl.load(addend_ptr + crop * addend_stride_b + o_out, mask=m_out, other=0.0)
        else:
            addend = tl.load(addend_ptr + channel, mask=m_channel, other=0.0)[None, :]
        accumulator += addend.to(tl.float32)
    tl.store(out_ptr + image * (SCALE * SCALE * HW * CO) + o_out, accumulator, mask=m_out)
    if statistics_ptr is not None:
        count = tl.minimum(HW - tile % TILES * PIXELS, PIXELS)
        total = tl.sum(tl.where(inside[:, None], accumulator, 0.0), 0)
        deviation = tl.where(inside[:, None], accumulator - (total / count)[None, :], 0.0)
        p_statistics = statistics_ptr + tl.program_id(0).to(tl.int64) * (2 * CO) + channel
        tl.store(p_statistics, total, mask=m_channel)
        tl.store(p_statistics + CO, tl.sum(deviation * deviation, 0), mask=m_channel)


@dataclass(frozen=True)
class Size:
    """Sizes of a convolution; `height` and `width` are the input's, `taps` is K and `scale` S."""

    height: int
    width: int
    channels_in: int
    channels_out: int
    taps: int
    scale: int = 1

    @property
    def pixels(self) -> int:
        """Pixels of an input map."""
        return self.height * self.width

    @property
    def phases(self) -> int:
        """Output pixels for each input pixel."""
        return self.scale**2


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
    """Return a config that fits every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
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
    """Few and large tiles: the interpreter takes as long for a small program as for a large one."""
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


def problem(op: str, x: Tensor, weight: Tensor, size: Size, *, input_precision: str, **_: Any) -> Problem:
    """What a measured config of a convolution in an op is found by."""
    return Problem.of(op, "convolution", ConvolutionConfig, x, input_precision, **vars(size))


def launch(
    x: Tensor,
    weight: Tensor,
    size: Size,
    *,
    addend: Tensor | None = None,
    norm: Tensor | None = None,
    statistics: bool = False,
    input_precision: str,
    config: ConvolutionConfig,
) -> tuple[Tensor, Tensor | None]:
    """Convolve `x [B, t, H*W, CI]`, whose last two dimensions are contiguous. Arguments are not checked.

    Args:
        weight: `[S*S*CO, K, K, CI]`, contiguous.
        addend: `[CO]`, or `[B or 1, S*H*S*W, CO]`, contiguous.
        norm: scale and shift `[B*t, 2, CI]` of the input (`group_norm.py`).
        statistics: whether to return statistics of the output.

    Returns:
        `[B, t, S*H*S*W, CO]`, and `[B*t, parts, 2, CO]` or None.
    """
    B, t = x.shape[:2]
    is_map = addend is not None and addend.ndim == 3
    by_image = norm is not None or statistics or is_map
    if not by_image:
        x = x.contiguous()
    out = x.new_empty((B, t, size.phases * size.pixels, size.channels_out))
    tiles = triton.cdiv(size.pixels, config.pixels)
    partial_sums = None
    if statistics:
        shape = (B * t, tiles * size.phases, 2, size.channels_out)
        partial_sums = x.new_empty(shape, dtype=torch.float32)
    tiles = B * t * tiles if by_image else triton.cdiv(B * t * size.pixels, config.pixels)
    launcher.run(
        convolution_kernel, (tiles * size.phases, triton.cdiv(size.channels_out, config.channels)),
        x, weight, addend, norm, out, partial_sums, t, B * t, x.stride(0), x.stride(1),
        addend.expand(B, -1, -1).stride(0) if addend is not None and is_map else 0,
        H=size.height, W=size.width, CI=size.channels_in, CO=size.channels_out, TAPS=size.taps,
        SCALE=size.scale, ADDEND_IS_MAP=is_map, BY_IMAGE=by_image, PIXELS=config.pixels,
        CHANNELS=config.channels, DEPTH=config.depth, PRECISION=input_precision, config=config,
    )  # fmt: skip
    return out, partial_sums


def kernel_of(op: str) -> Kernel[ConvolutionConfig]:
    """The kernel as an op calls it, with measured configs of its own."""
    return Kernel(launch, partial(problem, op), default_config, candidates, interpreter_config)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of scale and shift, in which the input is normalised: fp16 where its packed arithmetic serves."""
    return torch.float16 if dtype == torch.float16 else torch.float32
