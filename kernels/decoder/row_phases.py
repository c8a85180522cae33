"""Phases of an upsampled, normalised map, computed row by row; one of the decoder's kernels.

    y[2 r + a, 2 s + b] = g + sum_ij W[a, b, :, :, i, j] . f(x[r + i + a - 1, s + j + b - 1])
    f(x) = relu(scale x + shift)        (`layers.py`, S = 2)

with g a crop's guidance map, the same for all classes. A program takes a block of columns of one image and
one horizontal phase b. The block is cut into strips of rows, and the program handles one row of each strip at
a time. An input row is loaded and normalised once. It is multiplied by both rows of taps of both vertical
phases, and added to the accumulators of four output rows. The weights stay in shared memory; guidance is
loaded before the products that it is added to. The normalised map, patches, and the map without guidance are
never materialised. Statistics of the output are summed in registers; a part is a program's block. For 16-bit
types.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.decoder import group_norm as group_norms
from catseg_fast.kernels.decoder.common import again, load_channels, normalise, store_statistics, sum_rows
from catseg_fast.kernels.decoder.group_norm import GroupNorm
from catseg_fast.kernels.decoder.layers import Layer, divisor, new_map, new_statistics, stride_b
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel


@triton.jit(do_not_specialize=["classes"])
def row_phases_kernel(
    x_ptr,  # [B*t, H+2, W+2, CI], with a border
    weight_ptr,  # [2, 2, 2*2*CI, CO], packed; phases first
    guidance_ptr,  # [B or 1, 2H*2W, CO]
    norm_ptr,  # [B*t, 2, CI], scale and shift
    out_ptr,  # [B*t, 2H+2, 2W+2, CO], output, without its border
    statistics_ptr,  # [B*t, W/COLUMNS*2, 2, CO] fp32, output
    classes,  # t
    guidance_stride_b,
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    STRIPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    PIXELS: tl.constexpr = STRIPS * COLUMNS
    STRIP: tl.constexpr = H // STRIPS
    BLOCKS: tl.constexpr = W // COLUMNS
    PITCH: tl.constexpr = 2 * W + 2  # columns of the output
    b = tl.program_id(0) % 2
    block = tl.program_id(0) // 2 % BLOCKS
    image = tl.program_id(0) // (2 * BLOCKS)
    m = tl.arange(0, PIXELS)
    n = tl.arange(0, CO)
    k = tl.arange(0, CI)
    # The taps in row i and column j of vertical phase a.
    TAP: tl.constexpr = CI * CO
    p_weight = weight_ptr + b * (4 * TAP) + k[:, None] * CO + n[None, :]
    w_even_00 = tl.load(p_weight)
    w_even_01 = tl.load(p_weight + TAP)
    w_even_10 = tl.load(p_weight + 2 * TAP)
    w_even_11 = tl.load(p_weight + 3 * TAP)
    w_odd_00 = tl.load(p_weight + 8 * TAP)
    w_odd_01 = tl.load(p_weight + 9 * TAP)
    w_odd_10 = tl.load(p_weight + 10 * TAP)
    w_odd_11 = tl.load(p_weight + 11 * TAP)
    p_norm = norm_ptr + image.to(tl.int64) * (2 * CI)
    scale = load_channels(p_norm, CI, CI, CI)
    shift = load_channels(p_norm + CI, CI, CI, CI)

    top = m // COLUMNS * STRIP
    column = block * COLUMNS + m % COLUMNS
    o_x = ((top * (W + 2) + column + b) * CI)[:, None] + k[None, :]
    o_out = ((2 * top * PITCH + 2 * column + b + 1) * CO)[:, None] + n[None, :]
    o_guidance = ((2 * top * (2 * W) + 2 * column + b) * CO)[:, None] + n[None, :]
    p_x = x_ptr + image.to(tl.int64) * ((H + 2) * (W + 2) * CI)
    p_out = out_ptr + image.to(tl.int64) * ((2 * H + 2) * PITCH * CO)
    p_guidance = guidance_ptr + (image // classes).to(tl.int64) * guidance_stride_b
    sums = tl.zeros((WARPS, 8, CO), tl.float32)
    squares = tl.zeros((WARPS, 8, CO), tl.float32)
    even = tl.zeros((PIXELS, CO), tl.float32)
    odd = tl.zeros((PIXELS, CO), tl.float32)
    for row in tl.range(0, STRIP + 2, num_stages=STAGES):
        # Input row r completes output rows 2 r - 2 and 2 r - 3 of the strip (counted from 0), if they exist.
        ends_even = (row >= 1) & (row <= STRIP)
        ends_odd = row >= 2
        g_even = tl.load(p_guidance + (2 * row - 2) * (2 * W * CO) + o_guidance, mask=ends_even, other=0.0)
        g_odd = tl.load(p_guidance + (2 * row - 3) * (2 * W * CO) + o_guidance, mask=ends_odd, other=0.0)
        p_row = p_x + row * ((W + 2) * CI) + o_x
        x = normalise(tl.load(p_row, cache_modifier=".ca"), scale, shift)
        done_even = tl.dot(x, w_even_10, even)
        x = again(x)
        even = tl.dot(x, w_even_00, tl.zeros((PIXELS, CO), tl.float32))
        x = again(x)
        done_odd = tl.dot(x, w_odd_10, odd)
        x = again(x)
        odd = tl.dot(x, w_odd_00, tl.zeros((PIXELS, CO), tl.float32))
        x = normalise(tl.load(p_row + CI, cache_modifier=".ca"), scale, shift)
        done_even = tl.dot(x, w_even_11, done_even)
        x = again(x)
        even = tl.dot(x, w_even_01, even)
        x = again(x)
        done_odd = tl.dot(x, w_odd_11, done_odd)
        x = again(x)
        odd = tl.dot(x, w_odd_01, odd)
        done_even += g_even.to(tl.float32)
        p_row = p_out + (2 * row - 1) * (PITCH * CO) + o_out
        tl.store(
            p_row, done_even.to(out_ptr.dtype.element_ty), mask=tl.broadcast_to(ends_even, done_even.shape)
        )
        done_odd += g_odd.to(tl.float32)
        p_row = p_out + (2 * row - 2) * (PITCH * CO) + o_out
        tl.store(p_row, done_odd.to(out_ptr.dtype.element_ty), mask=tl.broadcast_to(ends_odd, done_odd.shape))
        one_even = tl.where(ends_even, 1.0, 0.0)
        one_odd = tl.where(ends_odd, 1.0, 0.0)
        sums += (
            sum_rows(done_even, PIXELS, CO, WARPS) * one_even
            + sum_rows(done_odd, PIXELS, CO, WARPS) * one_odd
        )
        squares += (
            sum_rows(done_even * done_even, PIXELS, CO, WARPS) * one_even
            + sum_rows(done_odd * done_odd, PIXELS, CO, WARPS) * one_odd
        )
    part = (image.to(tl.int64) * BLOCKS + block) * 2 + b
    store_statistics(statistics_ptr + part * (2 * CO), sums, squares, n, 2 * H * COLUMNS, CO)


@dataclass(frozen=True)
class RowPhasesConfig(LaunchConfig):
    """Launch config: strips of rows, and columns, per program."""

    strips: int
    columns: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def unsupported(layer: Layer, dtype: torch.dtype, capability: int) -> str | None:
    """Return why the kernel does not compute a layer on a compute capability, or None."""
    if capability in (86, 89):
        return "it leaves too little of 100 KB of shared memory for a second program"
    if dtype == torch.float32:
        return "it is for 16-bit types"
    if layer.scale != 2 or not layer.normalised:
        return "it is for the phases of normalised maps"
    if layer.channels_in != layer.block_in or layer.channels_out != layer.block_out:
        return f"{layer.channels_in} or {layer.channels_out} channels are not a power of two from 16 up"
    if layer.channels_in > 64 or layer.channels_out > 32:
        return "four accumulators and eight taps of so many channels are too large for a multiprocessor"
    columns = divisor(layer.width, 16)
    if divisor(layer.height, 64 // columns) * columns < 64:
        return f"{layer.height}x{layer.width} pixels cannot be divided into strips and columns"
    return None


@cache
def default_config(capability: int, problem: Problem) -> RowPhasesConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    columns = divisor(problem.size("width"), 16)
    stages = 1 if capability >= 100 else 2  # with tensor memory, a second stage leaves too few registers
    return RowPhasesConfig(64 // columns, columns, num_warps=4, num_stages=stages)


def candidates(capability: int, problem: Problem) -> tuple[RowPhasesConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    others = [
        replace(tiled, strips=64 // columns, columns=columns)
        for columns in (8, 16, 32)
        if problem.size("width") % columns == 0 and problem.size("height") % (64 // columns) == 0
        for tiled in grid(default, num_stages=(1, 2, 3), maxnreg=(128, 168, None))
    ]
    return default_first(default, others)


def problem(
    x: Tensor, weight: Tensor, guidance: Tensor, norm: Tensor, group_norm: GroupNorm, layer: Layer
) -> Problem:
    """The sizes and types by which a measured config is found."""
    return Problem.of("decode", "row_phases", RowPhasesConfig, x, "ieee", **layer.sizes())


def launch(
    x: Tensor,
    weight: Tensor,
    guidance: Tensor,
    norm: Tensor,
    group_norm: GroupNorm,
    layer: Layer,
    *,
    config: RowPhasesConfig,
) -> tuple[Tensor, Tensor]:
    """Return the output with its border, `[B, t, 2H + 2, 2W + 2, out]`, and its scale and shift.

    Args:
        x: `[B, t, H + 2, W + 2, in]`, contiguous.
        weight: packed.
        guidance: `[B or 1, 2H * 2W, out]`, contiguous but for B.
        norm: scale and shift of the input, `[B, t, 2, in]`.
        group_norm: the normalisation of the output.
        layer: the sizes.
        config: the launch config.
    """
    (B, t), parts = x.shape[:2], layer.width // config.columns * 2
    out, statistics = new_map(x, layer), new_statistics(x, layer, parts)
    launcher.run(
        row_phases_kernel, (B * t * parts,),
        x, weight, guidance, norm, out, statistics, t, stride_b(guidance),
        **layer.constants(), STRIPS=config.strips, COLUMNS=config.columns,
        WARPS=config.num_warps, STAGES=config.num_stages, config=config,
    )  # fmt: skip
    return out, group_norms.launch(out, statistics, 2 * layer.height * config.columns, group_norm, layer)


KERNEL = Kernel(launch, problem, default_config, candidates, compared=group_norms.normalise_plainly)
