"""Convolution of tiles fetched by the tensor memory accelerator; one of the decoder's kernels.

    y[S r + a, S s + b] = g + sum_ij W[a, b, :, :, i, j] . f(x[r + i + a - 1, s + j + b - 1])

with f the identity or relu(scale x + shift), and g a crop's guidance map or nothing (`layers.py`). A program
takes a tile of `classes` images by `rows` by `columns` and one phase (a, b). For each tap, the tile's input
is a box of the map. Boxes and weights are read through tensor descriptors, without index arithmetic or masks.
Outside a map without a border the accelerator reads zeros, as is right where f is the identity. The
normalised map, patches, and the map without guidance are never materialised. Statistics of the output are
computed from the accumulator; a part is an image's tile. For 16-bit types and compute capability 9.0 or
higher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from catseg_fast.kernels.decoder import group_norm as group_norms
from catseg_fast.kernels.decoder.common import load_channels, normalise
from catseg_fast.kernels.decoder.group_norm import GroupNorm
from catseg_fast.kernels.decoder.layers import Layer, divisor, new_map, new_statistics, stride_b
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel


@triton.jit(do_not_specialize=["classes"])
def boxes_kernel(
    x_desc,  # [B, t, H (+ 2), W (+ 2), CI] in boxes [1, CLASSES, ROWS, COLUMNS, CHANNELS]
    weight_desc,  # [S*S*K*K*CI, CO], packed, in boxes [CHANNELS, CO]
    guidance_ptr,  # [B or 1, S*H*S*W, CO], or None
    norm_ptr,  # [B*t, 2, CI], scale and shift of an x with a border, or None
    out_ptr,  # [B*t, S*H+2, S*W+2, CO], output, without its border
    statistics_ptr,  # [B*t, tiles*S*S, 2, CO] fp32, output
    classes,  # t
    guidance_stride_b,
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,  # input channels per step
):
    PIXELS: tl.constexpr = ROWS * COLUMNS  # of an image
    M: tl.constexpr = CLASSES * PIXELS
    PHASES: tl.constexpr = S * S
    STEPS: tl.constexpr = CI // CHANNELS
    TILES: tl.constexpr = (H // ROWS) * (W // COLUMNS)
    PITCH: tl.constexpr = S * W + 2
    # Phases of a tile, which share its input, are consecutive.
    phase = tl.program_id(0) % PHASES
    tile = tl.program_id(0) // PHASES % TILES
    group = tl.program_id(0) // (PHASES * TILES)
    groups = tl.cdiv(classes, CLASSES)
    crop = group // groups
    first = group % groups * CLASSES
    a = phase // S
    b = phase % S
    top = tile // (W // COLUMNS) * ROWS
    left = tile % (W // COLUMNS) * COLUMNS
    # Position of the first tap; a border moves the map by one.
    y = top + a - 1 if norm_ptr is None else top + a
    x = left + b - 1 if norm_ptr is None else left + b
    if norm_ptr is not None:
        tl.static_assert(CLASSES == 1 and STEPS == 1)
        p_norm = norm_ptr + (crop.to(tl.int64) * classes + first) * (2 * CI)
        scale = load_channels(p_norm, CI, CI, CHANNELS)
        shift = load_channels(p_norm + CI, CI, CI, CHANNELS)
    accumulator = tl.zeros((M, CO), tl.float32)
    for step in range(K * K * STEPS):
        i = step // (K * STEPS)
        j = step // STEPS % K
        box = x_desc.load([crop, first, y + i, x + j, step % STEPS * CHANNELS])
        box = tl.reshape(box, (M, CHANNELS))
        if norm_ptr is not None:
            box = normalise(box, scale, shift)
        weight = weight_desc.load([phase * (K * K * CI) + step * CHANNELS, 0])
        accumulator = tl.dot(box, weight, accumulator)

    m = tl.arange(0, M)
    n = tl.arange(0, CO)
    row = S * (top + m // COLUMNS % ROWS) + a
    column = S * (left + m % COLUMNS) + b
    class_ = first + m // PIXELS
    image = crop.to(tl.int64) * classes + class_
    if guidance_ptr is not None:
        p_guidance = guidance_ptr + crop.to(tl.int64) * guidance_stride_b
        o_guidance = ((row * (S * W) + column) * CO)[:, None] + n[None, :]
        accumulator += tl.load(p_guidance + o_guidance).to(tl.float32)
    p_out = out_ptr + (image * ((S * H + 2) * PITCH * CO) + ((row + 1) * PITCH + column + 1) * CO)[:, None]
    tl.store(p_out + n[None, :], accumulator.to(out_ptr.dtype.element_ty), mask=(class_ < classes)[:, None])

    # The difference loses less precision than the map's 16 bits lose beside a mean of this size.
    sums = tl.sum(tl.reshape(accumulator, (CLASSES, PIXELS, CO)), 1)
    squares = tl.sum(tl.reshape(accumulator * accumulator, (CLASSES, PIXELS, CO)), 1)
    squares = tl.maximum(squares - sums * sums / PIXELS, 0.0)
    class_ = first + tl.arange(0, CLASSES)
    part = (crop.to(tl.int64) * classes + class_) * (TILES * PHASES) + tile * PHASES + phase
    p_statistics = statistics_ptr + (part * (2 * CO))[:, None] + n[None, :]
    m_statistics = (class_ < classes)[:, None] & (n < CO)[None, :]
    tl.store(p_statistics, sums, mask=m_statistics)
    tl.store(p_statistics + CO, squares, mask=m_statistics)


@dataclass(frozen=True)
class BoxesConfig(LaunchConfig):
    """Launch config: classes, rows and columns of a tile, input channels per step."""

    classes: int
    rows: int
    columns: int
    channels: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def unsupported(layer: Layer, x: Tensor, weight: Tensor, capability: int) -> str | None:
    """Return why the kernel does not compute a layer of `x` on a compute capability, or None."""
    if capability < 90:
        return f"compute capability {capability / 10} has no tensor memory accelerator"
    if x.data_ptr() % 16 or any(not stride or stride * x.itemsize % 16 for stride in x.stride()[:-1]):
        return "pixels are not at separate multiples of 16 bytes"
    if weight.data_ptr() % 16:
        return "the weight does not start at a multiple of 16 bytes"
    if x.dtype == torch.float32:
        return "it is for 16-bit types"
    if layer.group != (1, 1):
        return "it computes pixels one by one, not in groups"
    if layer.channels_in != layer.block_in or layer.channels_out != layer.block_out:
        return f"{layer.channels_in} or {layer.channels_out} channels are not a power of two from 16 up"
    if layer.channels_out > 128 or (layer.normalised and layer.channels_in > 128):
        return f"{layer.channels_in} or {layer.channels_out} channels are too many for a multiprocessor"
    rows, columns = tile(layer.height, layer.width)
    if rows * columns < (64 if layer.normalised else 32):
        return f"{layer.height}x{layer.width} pixels cannot be divided into tiles"
    return None


def tile(height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the tiles, of at most 128 pixels, into which a map is divided."""
    columns = divisor(width, 16)
    return divisor(height, 128 // columns), columns


@cache
def default_config(capability: int, problem: Problem) -> BoxesConfig:
    """Return a config that fits every GPU of a compute capability (as 90, 100)."""
    rows, columns = tile(problem.size("height"), problem.size("width"))
    normalised, channels = bool(problem.size("normalised")), problem.size("channels_in")
    return BoxesConfig(
        classes=1 if normalised else 128 // (rows * columns),
        rows=rows,
        columns=columns,
        channels=channels if normalised else min(channels, 64),
        num_warps=4,
        num_stages=3,
        maxnreg=168 if problem.dtype == "fp16" else None,  # three programs fit on a multiprocessor
    )


def candidates(capability: int, problem: Problem) -> tuple[BoxesConfig, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(capability, problem)
    others = [default]
    if not problem.size("normalised"):
        others += [replace(default, classes=2 * default.classes, num_warps=8)]
        others += [replace(default, classes=default.classes // 2)] if default.classes > 1 else []
    return default_first(
        default,
        [
            config
            for tiled in others
            for config in grid(tiled, num_stages=(2, 3, 4), maxnreg=(128, 168, None))
        ],
    )


def problem(
    x: Tensor,
    weight: Tensor,
    guidance: Tensor | None,
    norm: Tensor | None,
    group_norm: GroupNorm,
    layer: Layer,
) -> Problem:
    """The sizes and types by which a measured config is found."""
    return Problem.of("decode", "boxes", BoxesConfig, x, "ieee", **layer.sizes())


def launch(
    x: Tensor,
    weight: Tensor,
    guidance: Tensor | None,
    norm: Tensor | None,
    group_norm: GroupNorm,
    layer: Layer,
    *,
    config: BoxesConfig,
) -> tuple[Tensor, Tensor]:
    """Return the output with its border, `[B, t, S*H + 2, S*W + 2, out]`, and its scale and shift.

    Args:
        x: `[B, t, H, W, in]`, or, if `norm` is given, `[B, t, H + 2, W + 2, in]` with a border; channels are
            contiguous, other strides are multiples of 16 bytes.
        weight: packed.
        guidance: `[B or 1, S*H * S*W, out]`, contiguous but for B.
        norm: scale and shift of the input, `[B, t, 2, in]`.
        group_norm: the normalisation of the output.
        layer: the sizes.
        config: the launch config.
    """
    B, t = x.shape[:2]
    tiles = layer.pixels // (config.rows * config.columns)
    out, statistics = new_map(x, layer), new_statistics(x, layer, tiles * layer.phases)
    box = [1, config.classes, config.rows, config.columns, config.channels]
    launcher.run(
        boxes_kernel, (B * triton.cdiv(t, config.classes) * tiles * layer.phases,),
        TensorDescriptor.from_tensor(x, box),
        TensorDescriptor.from_tensor(weight.flatten(0, 1), [config.channels, layer.channels_out]),
        guidance, norm, out, statistics, t, stride_b(guidance),
        **layer.constants(), S=layer.scale, K=layer.taps, CLASSES=config.classes, ROWS=config.rows,
        COLUMNS=config.columns, CHANNELS=config.channels, config=config,
    )  # fmt: skip
    return out, group_norms.launch(out, statistics, config.rows * config.columns, group_norm, layer)


KERNEL = Kernel(launch, problem, default_config, candidates, compared=group_norms.normalise_plainly)
