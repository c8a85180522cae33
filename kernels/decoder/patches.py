"""Convolution of patches gathered through pointers; the decoder's kernel for every layer and type.

    y[S r + a, S s + b] = addend + sum_ij W[a, b, :, :, i, j] . f(x[r + i + a - 1, s + j + b - 1])

with f the identity or relu(scale x + shift); the addend is a crop's guidance map, a bias, or nothing
(`layers.py`). One matrix product over a patch of input pixels and their channels computes a group of output
pixels of one phase (a, b), with a packed weight that is zero where a tap does not reach. The head, with one
channel, fills a tile with 4x6 of its outputs, whose patches of 6x8 pixels take 2 input pixels per output
instead of 9. The normalised map, patches, and the map without its addend are never materialised.

Sizes that do not fill a tile are masked. If statistics of the output are requested, they are computed from
the accumulator; a part is a tile of a phase. Otherwise this is the last layer: it writes logits to memory
with any strides over B and t, in that memory's type, and sets a flag if one of them is infinite or NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.decoder import group_norm as group_norms
from catseg_fast.kernels.decoder.common import load_channels, normalise
from catseg_fast.kernels.decoder.group_norm import GroupNorm
from catseg_fast.kernels.decoder.layers import Layer, block, new_map, new_statistics, stride_b
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel


@triton.jit(do_not_specialize=["classes"])
def patches_kernel(
    x_ptr,  # [B, t, H (+ 2), W (+ 2), CI], strided over B and t; with a border if normalised
    weight_ptr,  # [S*S, patch pixels * BLOCK_CI, BLOCK_N], packed
    addend_ptr,  # [B or 1, S*H*S*W, CO] if ADDEND_IS_MAP, [CO] if not, or None
    norm_ptr,  # [B*t, 2, CI], scale and shift of x, or None
    out_ptr,  # [B, t, S*H (+ 2), S*W (+ 2), CO], output, strided over B and t; with a border if STATISTICS
    statistics_ptr,  # [B*t, tiles*S*S, 2, CO] fp32, output, or None
    flag_ptr,  # [1] int32, set to 1 if an output is infinite or NaN, or None
    classes,  # t
    x_stride_b,
    x_stride_t,
    addend_stride_b,
    out_stride_b,
    out_stride_t,
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    S: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    PATCH_COLUMNS: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADDEND_IS_MAP: tl.constexpr,
    GROUPS: tl.constexpr,  # groups per tile
    OUTPUTS: tl.constexpr,  # outputs of a group per program
    DEPTH: tl.constexpr,  # patch pixels x input channels per step
    PRECISION: tl.constexpr,
):
    PHASES: tl.constexpr = S * S
    PATCH_ROW: tl.constexpr = PATCH_COLUMNS * BLOCK_CI
    PER_ROW: tl.constexpr = (W + GROUP_COLUMNS - 1) // GROUP_COLUMNS
    ALL: tl.constexpr = (H + GROUP_ROWS - 1) // GROUP_ROWS * PER_ROW
    TILES: tl.constexpr = (ALL + GROUPS - 1) // GROUPS
    PIXELS: tl.constexpr = 1 if DEPTH <= BLOCK_CI else DEPTH
    FULL: tl.constexpr = H % GROUP_ROWS == 0 and W % GROUP_COLUMNS == 0 and ALL % GROUPS == 0
    BORDER: tl.constexpr = 0 if norm_ptr is None else 1
    PITCH: tl.constexpr = W + 2 * BORDER
    phase = tl.program_id(0) % PHASES
    tile = tl.program_id(0) // PHASES % TILES
    image = tl.program_id(0) // (PHASES * TILES)
    crop = (image // classes).to(tl.int64)
    class_ = (image % classes).to(tl.int64)
    image = image.to(tl.int64)
    a = phase // S
    b = phase % S
    group = tile * GROUPS + tl.arange(0, GROUPS)
    row = group // PER_ROW * GROUP_ROWS
    column = group % PER_ROW * GROUP_COLUMNS
    # The first input pixel of a patch; a border moves the map by one.
    y = row + a - 1 + BORDER
    x = column + b - 1 + BORDER
    p_x = x_ptr + crop * x_stride_b + class_ * x_stride_t + ((y * PITCH + x) * CI)[:, None]
    k = tl.arange(0, DEPTH)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    p_weight = weight_ptr + phase * (PATCH_ROWS * PATCH_ROW * BLOCK_N) + k[:, None] * BLOCK_N + n[None, :]
    if norm_ptr is not None:
        p_norm = norm_ptr + image * (2 * CI)
        if DEPTH >= BLOCK_CI:
            scale = load_channels(p_norm, CI, BLOCK_CI, DEPTH)
            shift = load_channels(p_norm + CI, CI, BLOCK_CI, DEPTH)

    accumulator = tl.zeros((GROUPS, OUTPUTS), tl.float32)
    for start in range(0, PATCH_ROWS * PATCH_ROW, DEPTH):
        # A step lies within a row of a patch, and is a part of a pixel or a number of whole pixels.
        i = start // PATCH_ROW
        j = (start - i * PATCH_ROW) // BLOCK_CI
        if DEPTH < BLOCK_CI:
            channel = start % BLOCK_CI + k
            o_k = channel
        else:
            channel = k % BLOCK_CI
            o_k = k if CI == BLOCK_CI else k // BLOCK_CI * CI + channel
        p_patch = p_x + (i * PITCH + j) * CI + o_k[None, :]
        if FULL and norm_ptr is not None and CI == BLOCK_CI:
            patch = tl.load(p_patch, cache_modifier=".ca")
        else:
            m_y = (y + i >= 0) & (y + i < H + 2 * BORDER)
            # A step within a pixel has one mask for all its channels.
            x_k = x[:, None] + (j + tl.arange(0, PIXELS) // BLOCK_CI)[None, :]
            m_patch = m_y[:, None] & (x_k >= 0) & (x_k < PITCH)
            if CI < BLOCK_CI:
                m_patch &= (channel < CI)[None, :]
            patch = tl.load(p_patch, mask=m_patch, other=0.0, cache_modifier=".ca")
        if norm_ptr is not None:
            if DEPTH < BLOCK_CI:
                o_norm = channel[None, :]
                scale = tl.load(p_norm + o_norm, mask=o_norm < CI, other=0.0)
                shift = tl.load(p_norm + CI + o_norm, mask=o_norm < CI, other=0.0)
            patch = normalise(patch, scale, shift)
        weight = tl.load(p_weight + start * BLOCK_N)
        accumulator = tl.dot(patch, weight, accumulator, input_precision=PRECISION)

    # A column is a channel of an output pixel of the group.
    channel = n % CO
    dy = n // (GROUP_COLUMNS * CO)
    dx = n // CO % GROUP_COLUMNS
    m_n = n < GROUP_ROWS * GROUP_COLUMNS * CO
    m_out = m_n[None, :]
    if not FULL:
        m_out &= (row[:, None] + dy[None, :] < H) & (column[:, None] + dx[None, :] < W)
    out_row = (S * row + a)[:, None] + (S * dy)[None, :]
    out_column = (S * column + b)[:, None] + (S * dx)[None, :]
    if addend_ptr is not None:
        if ADDEND_IS_MAP:
            o_addend = (out_row * (S * W) + out_column) * CO + channel[None, :]
            addend = tl.load(addend_ptr + crop * addend_stride_b + o_addend, mask=m_out, other=0.0)
        else:
            addend = tl.load(addend_ptr + channel, mask=m_n, other=0.0)[None, :]
        accumulator += addend.to(tl.float32)
    OUT_BORDER: tl.constexpr = 0 if statistics_ptr is None else 1
    OUT_PITCH: tl.constexpr = S * W + 2 * OUT_BORDER
    p_out = out_ptr + crop * out_stride_b + class_ * out_stride_t
    o_out = ((out_row + OUT_BORDER) * OUT_PITCH + out_column + OUT_BORDER) * CO + channel[None, :]
    out = accumulator.to(out_ptr.dtype.element_ty)
    tl.store(p_out + o_out, out, mask=m_out)
    if flag_ptr is not None:
        # x - x is 0 unless x is infinite or NaN. Columns that are not stored are finite where the patch is.
        wrong = tl.max((out - out != 0).to(tl.int32))
        tl.store(flag_ptr, 1, mask=wrong > 0)
    if statistics_ptr is not None:
        tl.static_assert(GROUP_ROWS == 1 and GROUP_COLUMNS == 1)
        count = tl.minimum(H * W - tile * GROUPS, GROUPS)
        kept = accumulator if FULL else tl.where(m_out, accumulator, 0.0)
        total = tl.sum(kept, 0)
        deviation = accumulator - (total / count)[None, :]
        deviation = deviation if FULL else tl.where(m_out, deviation, 0.0)
        part = image * (TILES * PHASES) + tile * PHASES + phase
        p_statistics = statistics_ptr + part * (2 * CO) + n
        tl.store(p_statistics, total, mask=m_n)
        tl.store(p_statistics + CO, tl.sum(deviation * deviation, 0), mask=m_n)


@dataclass(frozen=True)
class PatchesConfig(LaunchConfig):
    """Launch config: groups and outputs per program, patch pixels times input channels per step."""

    groups: int
    outputs: int
    depth: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@cache
def default_config(capability: int, problem: Problem) -> PatchesConfig:
    """Return a config that fits every GPU of a compute capability (90 for 9.0)."""
    block_in, block_out = _blocks(problem)
    if problem.dtype == "fp32":
        # Without tensor cores, a second stage spills; on capability 10.0, four warps do, too.
        exact = problem.precision == "ieee"
        num_warps, num_stages = 8 if exact and capability >= 100 else 4, 1 if exact else 2
        return PatchesConfig(64, min(block_out, 64), min(block_in, 32), num_warps, num_stages)
    maxnreg = 168 if problem.dtype == "fp16" else None  # three programs fit on a multiprocessor
    if problem.size("group") > 1:
        depth = min(256 if capability >= 90 else 128, 8 * block_in)
        return PatchesConfig(64, block_out, depth, num_warps=4, num_stages=2, maxnreg=maxnreg)
    pixels = problem.size("height") * problem.size("width")
    groups = 64 if 0 < pixels % 128 <= 64 else 128
    if block_out >= 128:
        return PatchesConfig(groups, 128, min(block_in, 64), num_warps=8, num_stages=3)
    return PatchesConfig(groups, block_out, min(block_in, 64), num_warps=4, num_stages=3, maxnreg=maxnreg)


def candidates(capability: int, problem: Problem) -> tuple[PatchesConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
        others = grid(default, groups=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2))
    else:
        others = [
            replace(tiled, groups=groups, num_warps=num_warps)
            for groups, num_warps in ((64, 4), (128, 4), (128, 8))
            for tiled in grid(default, num_stages=(2, 3, 4), maxnreg=(128, 168, None))
        ]
    return default_first(default, [*others, *grid(default, depth=(max(16, default.depth // 2),))])


def interpreter_config(problem: Problem) -> PatchesConfig:
    """Return a config with few, large programs."""
    block_in, block_out = _blocks(problem)
    depth = 8 * block_in if problem.size("group") > 1 else block_in
    return PatchesConfig(1024, block_out, depth, num_warps=4, num_stages=1)


def _blocks(problem: Problem) -> tuple[int, int]:
    return block(problem.size("channels_in")), block(problem.size("group") * problem.size("channels_out"))


def problem(
    x: Tensor,
    weight: Tensor,
    addend: Tensor | None,
    norm: Tensor | None,
    group_norm: GroupNorm | None,
    layer: Layer,
    *,
    input_precision: str,
    **destination: Any,
) -> Problem:
    """The sizes and types by which a measured config is found."""
    return Problem.of("decode", "patches", PatchesConfig, x, input_precision, **layer.sizes())


def launch(
    x: Tensor,
    weight: Tensor,
    addend: Tensor | None,
    norm: Tensor | None,
    group_norm: GroupNorm | None,
    layer: Layer,
    *,
    input_precision: str,
    out: Tensor | None = None,
    flag: Tensor | None = None,
    config: PatchesConfig,
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and the scale and shift of its normalisation.

    With `group_norm`, the output has a border, `[B, t, S*H + 2, S*W + 2, out]`. Without it, this is the last
    layer: the output is `[B, t, S*H, S*W, out]`, and there is no scale and shift.

    Args:
        x: `[B, t, H, W, in]`, or, if `norm` is given, `[B, t, H + 2, W + 2, in]` with a border; contiguous
            but for B and t.
        weight: packed weight.
        addend: a map `[B or 1, S*H * S*W, out]`, contiguous but for B, or a bias `[out]`.
        norm: scale and shift of the input, `[B, t, 2, in]`.
        group_norm: the normalisation of the output.
        layer: the sizes.
        input_precision: precision of products of fp32 numbers.
        out: tensor for the result of the last layer, of any floating type, contiguous but for B and t; by
            default a new one.
        flag: `[1]`, int32: the last layer sets it to 1 if a number that it writes is infinite or NaN, and
            leaves it unchanged otherwise.
        config: the launch config.
    """
    (B, t), (group_rows, group_columns), (patch_rows, patch_columns) = x.shape[:2], layer.group, layer.patch
    groups = triton.cdiv(layer.height, group_rows) * triton.cdiv(layer.width, group_columns)
    tiles = triton.cdiv(groups, config.groups)
    statistics = None
    if group_norm is not None:
        out, statistics = new_map(x, layer), new_statistics(x, layer, tiles * layer.phases)
    elif out is None:
        shape = (layer.scale * layer.height, layer.scale * layer.width, layer.channels_out)
        out = x.new_empty((B, t, *shape))
    is_map = addend is not None and addend.ndim == 3
    launcher.run(
        patches_kernel, (B * t * tiles * layer.phases, layer.block_out // config.outputs),
        x, weight, addend, norm, out, statistics, flag, t, x.stride(0), x.stride(1),
        stride_b(addend) if is_map else 0, out.stride(0), out.stride(1),
        **layer.constants(), S=layer.scale, GROUP_ROWS=group_rows, GROUP_COLUMNS=group_columns,
        PATCH_ROWS=patch_rows, PATCH_COLUMNS=patch_columns, BLOCK_CI=layer.block_in, BLOCK_N=layer.block_out,
        ADDEND_IS_MAP=is_map, GROUPS=config.groups, OUTPUTS=config.outputs, DEPTH=config.depth,
        PRECISION=input_precision, config=config,
    )  # fmt: skip
    if group_norm is None or statistics is None:
        return out, None
    return out, group_norms.launch(out, statistics, config.groups, group_norm, layer)


KERNEL = Kernel(
    launch, problem, default_config, candidates, interpreter_config, group_norms.normalise_plainly
)
