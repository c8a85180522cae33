"""3x3 convolution of normalised maps, computed row by row; one of the decoder's kernels.

    y = conv3x3(relu(scale x + shift))        (`layers.py`, S = 1)

A program takes a block of columns of one image. The block is cut into strips of rows, and the program handles
one row of each strip at a time. An input row is loaded and normalised once: its three shifts along the row
are multiplied by all nine taps, and added to three accumulators, of the output rows above, at, and below it.
The weights stay in shared memory. The normalised map and patches are never materialised. Statistics of the
output are summed in registers; a part is a program's block. For 16-bit types.
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
from catseg_fast.kernels.decoder.layers import Layer, divisor, new_map, new_statistics
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel


@triton.jit
def rows_kernel(
    x_ptr,  # [B*t, H+2, W+2, CI], with a border
    weight_ptr,  # [9*CI, CO], packed
    norm_ptr,  # [B*t, 2, CI], scale and shift
    out_ptr,  # [B*t, H+2, W+2, CO], output, without its border
    statistics_ptr,  # [B*t, W/COLUMNS, 2, CO] fp32, output
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
    PITCH: tl.constexpr = W + 2
    block = tl.program_id(0) % BLOCKS
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    m = tl.arange(0, PIXELS)
    n = tl.arange(0, CO)
    k = tl.arange(0, CI)
    p_weight = weight_ptr + k[:, None] * CO + n[None, :]
    w00 = tl.load(p_weight)
    w01 = tl.load(p_weight + CI * CO)
    w02 = tl.load(p_weight + 2 * CI * CO)
    w10 = tl.load(p_weight + 3 * CI * CO)
    w11 = tl.load(p_weight + 4 * CI * CO)
    w12 = tl.load(p_weight + 5 * CI * CO)
    w20 = tl.load(p_weight + 6 * CI * CO)
    w21 = tl.load(p_weight + 7 * CI * CO)
    w22 = tl.load(p_weight + 8 * CI * CO)
    scale = load_channels(norm_ptr + image * (2 * CI), CI, CI, CI)
    shift = load_channels(norm_ptr + image * (2 * CI) + CI, CI, CI, CI)

    # The pixel above and to the left of an output pixel in the bordered input; its index is also that of the
    # pixel one row up and one column left in the bordered output.
    corner = m // COLUMNS * STRIP * PITCH + block * COLUMNS + m % COLUMNS
    p_x = x_ptr + image * ((H + 2) * PITCH * CI) + (corner * CI)[:, None] + k[None, :]
    p_out = out_ptr + image * ((H + 2) * PITCH * CO) + ((corner + 1) * CO)[:, None] + n[None, :]
    sums = tl.zeros((WARPS, 8, CO), tl.float32)
    squares = tl.zeros((WARPS, 8, CO), tl.float32)
    upper = tl.zeros((PIXELS, CO), tl.float32)  # the output row above the input row
    middle = tl.zeros((PIXELS, CO), tl.float32)  # the output row at the input row
    for row in tl.range(0, STRIP + 2, num_stages=STAGES):
        p_row = p_x + row * (PITCH * CI)
        x = normalise(tl.load(p_row, cache_modifier=".ca"), scale, shift)
        done = tl.dot(x, w20, upper)
        x = again(x)
        upper = tl.dot(x, w10, middle)
        x = again(x)
        middle = tl.dot(x, w00, tl.zeros((PIXELS, CO), tl.float32))
        x = normalise(tl.load(p_row + CI, cache_modifier=".ca"), scale, shift)
        done = tl.dot(x, w21, done)
        x = again(x)
        upper = tl.dot(x, w11, upper)
        x = again(x)
        middle = tl.dot(x, w01, middle)
        x = normalise(tl.load(p_row + 2 * CI, cache_modifier=".ca"), scale, shift)
        done = tl.dot(x, w22, done)
        x = again(x)
        upper = tl.dot(x, w12, upper)
        x = again(x)
        middle = tl.dot(x, w02, middle)
        # The first two rows of a strip complete no output row.
        ends = row >= 2
        p_row = p_out + (row - 1) * (PITCH * CO)
        tl.store(p_row, done.to(out_ptr.dtype.element_ty), mask=tl.broadcast_to(ends, done.shape))
        one = tl.where(ends, 1.0, 0.0)
        sums += sum_rows(done, PIXELS, CO, WARPS) * one
        squares += sum_rows(done * done, PIXELS, CO, WARPS) * one
    p_statistics = statistics_ptr + (image * BLOCKS + block) * (2 * CO)
    store_statistics(p_statistics, sums, squares, n, H * COLUMNS, CO)


@dataclass(frozen=True)
class RowsConfig(LaunchConfig):
    """Launch config: strips of rows, and columns, per program."""

    strips: int
    columns: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def unsupported(layer: Layer, dtype: torch.dtype) -> str | None:
    """Return why the kernel does not compute a layer, or None."""
    if dtype == torch.float32:
        return "it is for 16-bit types"
    if layer.scale != 1 or not layer.normalised or layer.group != (1, 1):
        return "it is for 3x3 convolutions of normalised maps"
    if layer.channels_in != layer.block_in or layer.channels_out != layer.block_out:
        return f"{layer.channels_in} or {layer.channels_out} channels are not a power of two from 16 up"
    if max(layer.channels_in, layer.channels_out) > 32:
        return "three accumulators and nine taps of more than 32 channels are too large for a multiprocessor"
    columns = divisor(layer.width, 32)
    if divisor(layer.height, 64 // columns) * columns < 64:
        return f"{layer.height}x{layer.width} pixels cannot be divided into strips and columns"
    return None


@cache
def default_config(capability: int, problem: Problem) -> RowsConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    columns = divisor(problem.size("width"), 32)
    # Four programs fit on a multiprocessor of H100, which normalises two fp16 numbers at a time.
    maxnreg = 128 if capability == 90 and problem.dtype == "fp16" else None
    return RowsConfig(64 // columns, columns, num_warps=4, num_stages=3, maxnreg=maxnreg)


def candidates(capability: int, problem: Problem) -> tuple[RowsConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    others = [
        replace(tiled, strips=64 // columns, columns=columns)
        for columns in (16, 32)
        if problem.size("width") % columns == 0 and problem.size("height") % (64 // columns) == 0
        for tiled in grid(default, num_stages=(2, 3, 4), maxnreg=(128, 168, None))
    ]
    return default_first(default, others)


def problem(x: Tensor, weight: Tensor, norm: Tensor, group_norm: GroupNorm, layer: Layer) -> Problem:
    """The sizes and types by which a measured config is found."""
    return Problem.of("decode", "rows", RowsConfig, x, "ieee", **layer.sizes())


def launch(
    x: Tensor, weight: Tensor, norm: Tensor, group_norm: GroupNorm, layer: Layer, *, config: RowsConfig
) -> tuple[Tensor, Tensor]:
    """Return the output with its border, `[B, t, H + 2, W + 2, out]`, and its scale and shift.

    Args:
        x: `[B, t, H + 2, W + 2, in]`, contiguous.
        weight: packed.
        norm: scale and shift of the input, `[B, t, 2, in]`.
        group_norm: the normalisation of the output.
        layer: the sizes.
        config: the launch config.
    """
    blocks = layer.width // config.columns
    out, statistics = new_map(x, layer), new_statistics(x, layer, blocks)
    launcher.run(
        rows_kernel, (x.shape[0] * x.shape[1] * blocks,),
        x, weight, norm, out, statistics,
        **layer.constants(), STRIPS=config.strips, COLUMNS=config.columns,
        WARPS=config.num_warps, STAGES=config.num_stages, config=config,
    )  # fmt: skip
    return out, group_norms.launch(out, statistics, layer.height * config.columns, group_norm, layer)


KERNEL = Kernel(launch, problem, default_config, candidates, compared=group_norms.normalise_plainly)
