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
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.launch import configs as tuning
from catseg_fast.kernels.launch.checks import DTYPES
from catseg_fast.kernels.launch.compile_target import CompileTarget
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.tunable import Workload


@triton.jit(do_not_specialize=["classes", "images"])
def convolution_kernel(
    x_ptr,  # [N, H*W, CI]; N images are crops of `classes` each
    weight_ptr,  # [S*S, CO, K*K, CI]
    addend_ptr,  # [B or 1, S*H, S*W, CO] if ADDEND_IS_MAP, [CO] if not, or None
    norm_ptr,  # [N, 2, CI], scale and shift, or None
    out_ptr,  # [N, S*H, S*W, CO], output
    statistics_ptr,  # [N, tiles*S*S, 2, CO] fp32, output: sum and squared deviations, or None
    classes,  # t
    images,  # N
    x_stride_crop,
    x_stride_class,
    addend_stride_crop,
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    ADDEND_IS_MAP: tl.constexpr,
    BY_IMAGE: tl.constexpr,  # no tile holds pixels of two images; else x is contiguous
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # output channels
    BLOCK_K: tl.constexpr,  # taps x input channels a step
):
    HW: tl.constexpr = H * W
    DEPTH: tl.constexpr = K * K * CI
    phase = tl.program_id(0) % (S * S)
    tile = tl.program_id(0) // (S * S)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if BY_IMAGE:
        TILES: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
        image = tile // TILES
        crop = (image // classes).to(tl.int64)
        pixel = tile % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = pixel < HW
        p_x = x_ptr + crop * x_stride_crop + (image % classes).to(tl.int64) * x_stride_class
        image = image.to(tl.int64)
    else:
        row = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (row // HW)[:, None].to(tl.int64)
        pixel = row % HW
        inside = row < images * HW
        p_x = x_ptr + image * (HW * CI)
    y = tl.where(inside, pixel // W, H + K)[:, None]  # a row that has no tap inside the map
    x = (pixel % W)[:, None]

    p_weight = weight_ptr + (phase * CO + channel)[:, None] * DEPTH
    m_channel = channel < CO
    accumulator = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    # A step is of one tap where the channels allow, so that its place is the same for all of the step.
    TAPS: tl.constexpr = 1 if CI % BLOCK_K == 0 else BLOCK_K
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tap = ((start + tl.arange(0, TAPS)) // CI)[None, :]
        dy = tap // K - K // 2 + phase // S
        dx = tap % K - K // 2 + phase % S
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
        # From DEPTH on, what is in the patch meets zeros.
        m_weight = m_channel[:, None] if DEPTH % BLOCK_K == 0 else m_channel[:, None] & (k < DEPTH)[None, :]
        weight = tl.load(p_weight + k[None, :], mask=m_weight, other=0.0)
        accumulator = tl.dot(patch, tl.trans(weight), accumulator, input_precision=PRECISION)

    m_out = inside[:, None] & m_channel[None, :]
    o_out = ((S * y + phase // S) * (S * W) + S * x + phase % S) * CO + channel[None, :]
    if addend_ptr is not None:
        if ADDEND_IS_MAP:
            addend = tl.load(addend_ptr + crop * addend_stride_crop + o_out, mask=m_out, other=0.0)
        else:
            addend = tl.load(addend_ptr + channel, mask=m_channel, other=0.0)[None, :]
        accumulator += addend.to(tl.float32)
    tl.store(out_ptr + image * (S * S * HW * CO) + o_out, accumulator, mask=m_out)
    if statistics_ptr is not None:
        count = tl.minimum(HW - tile % TILES * BLOCK_P, BLOCK_P)
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
class Config(LaunchConfig):
    """Launch config: pixels and output channels of a program, taps x input channels a step."""

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int


@cache
def default_config(size: Size, dtype: torch.dtype, capability: int) -> Config:
    """A config that fits every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
    channels = min(max(16, triton.next_power_of_2(size.channels_out)), 128)
    if dtype == torch.float32:
        return Config(64, channels, 32, num_warps=8 if channels == 128 else 4, num_stages=2)
    if channels == 128:
        pixels = 256 if capability >= 90 else 128
        return Config(pixels, channels, 64, num_warps=8, num_stages=3)
    pixels = 64 if 0 < size.pixels % 128 <= 64 else 128
    return Config(pixels, channels, 32 if size.channels_in % 64 == 32 else 64, num_warps=4, num_stages=3)


@cache
def interpreter_config(size: Size, dtype: torch.dtype) -> Config:
    """Few and large tiles: the interpreter takes as long for a small program as for a large one."""
    return replace(default_config(size, dtype, 90), pixels=1024, depth=256)


def candidates(size: Size, dtype: torch.dtype, capability: int) -> tuple[Config, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(size, dtype, capability)
    if dtype == torch.float32:
        others = grid(default, pixels=(32, 64, 128), depth=(16, 32), num_warps=(4, 8), num_stages=(1, 2))
    else:
        others = [
            replace(tiled, pixels=pixels, num_warps=num_warps)
            for pixels, num_warps in ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8))
            for tiled in grid(default, depth=(32, 64), num_stages=(2, 3))
        ]
    return default_first(default, [*others, *grid(default, num_stages=(1, 4))])


def problem(op: str, size: Size, dtype: torch.dtype, input_precision: str, crop_classes: int) -> Problem:
    """What a measured config of a convolution in an op is found by."""
    return Problem.of(op, "convolution", Config, dtype, input_precision, crop_classes, **vars(size))


def random_weight(workload: Workload, size: Size, device: torch.device) -> Tensor:
    """A weight `[S*S*CO, K, K, CI]` that keeps a standard deviation of one."""
    shape = (size.phases * size.channels_out, size.taps, size.taps, size.channels_in)
    return workload.normal(device, *shape, scale=(size.taps**2 * size.channels_in) ** -0.5)


def choose_config(op: str, size: Size, x: Tensor, input_precision: str) -> Config:
    """The config of a convolution in an op, on a device and in the type of `x [B, t, ...]`."""
    wanted = problem(op, size, x.dtype, input_precision, x.shape[0] * x.shape[1])
    return tuning.choose(
        wanted, x.device, lambda gpu: default_config(size, x.dtype, gpu), interpreter_config(size, x.dtype)
    )


def launch(
    x: Tensor,
    weight: Tensor,
    size: Size,
    config: Config,
    *,
    addend: Tensor | None = None,
    norm: Tensor | None = None,
    statistics: bool = False,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Convolve `x [B, t, H*W, CI]`, whose last two dimensions are contiguous. Nothing is checked.

    Args:
        weight: `[S*S*CO, K, K, CI]`, contiguous.
        addend: `[CO]`, or `[B or 1, S*H*S*W, CO]`, contiguous.
        norm: scale and shift `[B*t, 2, CI]` of the input (`group_norm.py`).
        statistics: whether to return statistics of the output.

    Returns:
        `[B, t, S*H*S*W, CO]`, and `[B*t, parts, 2, CO]` or None.
    """
    crops, classes = x.shape[:2]
    by_image = norm is not None or statistics or (addend is not None and addend.ndim == 3)
    if not by_image:
        x = x.contiguous()
    out = x.new_empty((crops, classes, size.phases * size.pixels, size.channels_out))
    tiles = triton.cdiv(size.pixels, config.pixels)
    partial = None
    if statistics:
        shape = (crops * classes, tiles * size.phases, 2, size.channels_out)
        partial = x.new_empty(shape, dtype=torch.float32)
    tiles = crops * classes * tiles if by_image else triton.cdiv(crops * classes * size.pixels, config.pixels)
    convolution_kernel[(tiles * size.phases, triton.cdiv(size.channels_out, config.channels))](
        x,
        weight,
        addend,
        norm,
        out,
        partial,
        classes,
        crops * classes,
        x.stride(0),
        x.stride(1),
        addend.expand(crops, -1, -1).stride(0) if addend is not None and addend.ndim == 3 else 0,
        **_constants(size, config, by_image, addend is not None and addend.ndim == 3, input_precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return out, partial


def compile_target(
    name: str,
    size: Size,
    dtype: torch.dtype,
    capability: int,
    input_precision: str = "ieee",
    *,
    addend: str | None = None,
    norm: bool = False,
    statistics: bool = False,
) -> CompileTarget:
    """The kernel as `launch` starts it with the default config; `addend` is "bias" or "map"."""
    config = default_config(size, dtype, capability)
    storage = f"*{DTYPES[dtype]}"
    pointers = {
        "x_ptr": storage,
        "weight_ptr": storage,
        "addend_ptr": storage if addend else None,
        "norm_ptr": f"*{DTYPES[norm_dtype(dtype)]}" if norm else None,
        "out_ptr": storage,
        "statistics_ptr": "*fp32" if statistics else None,
    }
    strides = ("x_stride_crop", "x_stride_class", "addend_stride_crop")
    by_image = norm or statistics or addend == "map"
    uses_mma = dtype != torch.float32 or input_precision != "ieee"
    return CompileTarget(
        name=f"{name} {DTYPES[dtype]}{'' if input_precision == 'ieee' else ' ' + input_precision}",
        kernel=convolution_kernel,
        signature={
            **{pointer: kind for pointer, kind in pointers.items() if kind is not None},
            **dict.fromkeys(("classes", "images", *strides), "i32"),
        },
        constexprs={
            **{pointer: None for pointer, kind in pointers.items() if kind is None},
            **_constants(size, config, by_image, addend == "map", input_precision),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=strides,
        expects_mma=("wgmma" if capability == 90 else "mma") if uses_mma else None,
    )


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of scale and shift, in which the input is normalised: fp16 where its packed arithmetic serves."""
    return torch.float16 if dtype == torch.float16 else torch.float32


def _constants(
    size: Size, config: Config, by_image: bool, addend_is_map: bool, input_precision: str
) -> dict[str, Any]:
    return {
        "H": size.height,
        "W": size.width,
        "CI": size.channels_in,
        "CO": size.channels_out,
        "K": size.taps,
        "S": size.scale,
        "ADDEND_IS_MAP": addend_is_map,
        "BY_IMAGE": by_image,
        "PRECISION": input_precision,
        "BLOCK_P": config.pixels,
        "BLOCK_N": config.channels,
        "BLOCK_K": config.depth,
    }
