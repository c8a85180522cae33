"""Cost volume of one prompt a class and its 7x7 convolution in one kernel; part of `cost_volume.py`.

    cost[b, t, i] = image[b, i] . text[b, t]        x[b, t] = conv7x7(cost[b, t]) + bias, to C channels

A program takes a group of classes and a band of rows of one crop. Of the band and three rows on either side,
it writes the cost to scratch memory of its own, classes last and with zeros around the map; then it reads it
back, shifted by each of the 49 taps, as the left operand of a second matrix product. Classes being next to
each other there, and zeros being where the map ends, that takes 16 bytes at a time and no mask a tap. Other
programs compute the overlap of bands again, so that none waits for another. The scratch memory, of B t HW
numbers and the overlap, stays in cache; patches `[B*t*HW, 49]` never reach memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.convolution import Size, random_weight
from catseg_fast.kernels.launch.checks import DTYPES
from catseg_fast.kernels.launch.compile_target import CompileTarget
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem, choose
from catseg_fast.kernels.launch.tunable import Tunable, Workload


@triton.jit(do_not_specialize=["classes"])
def embed_kernel(
    image_ptr,  # [B, HW, F]
    text_ptr,  # [B or 1, t, F]
    weight_ptr,  # [C, 49]
    bias_ptr,  # [C]
    cost_ptr,  # [programs, PLACES, CLASSES], scratch
    out_ptr,  # [B, t, HW, C], output
    classes,  # t
    image_stride_crop,
    image_stride_pixel,
    image_stride_feature,
    text_stride_crop,
    text_stride_class,
    H: tl.constexpr,
    W: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,  # of a band
    CLASSES: tl.constexpr,  # of a group
    BLOCK_P: tl.constexpr,  # pixels a step of the first product
    BLOCK_K: tl.constexpr,  # features a step
    BLOCK_M: tl.constexpr,  # pixels x classes a step of the second product
    BLOCK_N: tl.constexpr,  # output channels a step
):
    BANDS: tl.constexpr = (H + ROWS - 1) // ROWS
    PIXELS: tl.constexpr = (ROWS + 6) * W
    # Three zeros end each row and begin the next.
    PITCH: tl.constexpr = W + 3
    PLACES: tl.constexpr = (ROWS + 6) * PITCH + 3
    program = tl.program_id(0)
    groups = tl.cdiv(classes, CLASSES)
    # Programs that share text come one behind the other.
    top = program % BANDS * ROWS
    first_class = program // BANDS % groups * CLASSES
    crop = (program // (BANDS * groups)).to(tl.int64)
    o_class = tl.arange(0, CLASSES)

    k = tl.arange(0, BLOCK_K)
    text_class = tl.minimum(first_class + o_class, classes - 1)  # text beyond the last is not stored
    p_text = text_ptr + crop * text_stride_crop + text_class.to(tl.int64)[None, :] * text_stride_class
    p_cost = cost_ptr + program.to(tl.int64) * (PLACES * CLASSES) + o_class[None, :]
    for start in range(0, PIXELS, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        pixel = (top - 3) * W + place
        m_pixel = (pixel >= 0) & (pixel < H * W)
        p_image = image_ptr + crop * image_stride_crop + pixel[:, None] * image_stride_pixel
        cost = tl.zeros((BLOCK_P, CLASSES), tl.float32)
        for feature in range(0, F, BLOCK_K):
            m_feature = feature + k < F
            m_image = m_pixel[:, None] if F % BLOCK_K == 0 else m_pixel[:, None] & m_feature[None, :]
            m_text = None if F % BLOCK_K == 0 else m_feature[:, None]
            image = tl.load(p_image + (feature + k)[None, :] * image_stride_feature, mask=m_image, other=0.0)
            text = tl.load(
                p_text + (feature + k)[:, None], mask=m_text, other=None if F % BLOCK_K == 0 else 0.0
            )
            cost = tl.dot(image, text, cost, input_precision=PRECISION)
        o_cost = (place // W * PITCH + 3 + place % W)[:, None] * CLASSES
        tl.store(p_cost + o_cost, cost, mask=(place < PIXELS)[:, None])
    BORDER: tl.constexpr = triton.next_power_of_2((ROWS + 7) * 3)
    border = tl.arange(0, BORDER)
    o_border = (border // 3 * PITCH + border % 3)[:, None] * CLASSES
    zeros = tl.zeros((BORDER, CLASSES), cost_ptr.dtype.element_ty)
    tl.store(p_cost + o_border, zeros, mask=(border < (ROWS + 7) * 3)[:, None])
    tl.debug_barrier()  # all of the program's stores, before its loads

    tap = tl.arange(0, 64)
    m_tap = tap < 49
    o_tap = (tap // 7 * PITCH + tap % 7)[None, :] * CLASSES
    p_cost = cost_ptr + program.to(tl.int64) * (PLACES * CLASSES)
    for first_channel in range(0, C, BLOCK_N):
        channel = first_channel + tl.arange(0, BLOCK_N)
        m_channel = channel < C
        weight = tl.load(
            weight_ptr + channel[:, None] * 49 + tap[None, :],
            mask=m_channel[:, None] & m_tap[None, :],
            other=0.0,
        )
        bias = tl.load(bias_ptr + channel, mask=m_channel, other=0.0).to(tl.float32)
        for start in range(0, ROWS * W * CLASSES, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            place, member = row // CLASSES, row % CLASSES
            o_patch = (place // W * PITCH + place % W) * CLASSES + member
            m_patch = (place < ROWS * W)[:, None] & m_tap[None, :]
            patch = tl.load(p_cost + o_patch[:, None] + o_tap, mask=m_patch, other=0.0, cache_modifier=".ca")
            x = tl.dot(patch, tl.trans(weight), input_precision=PRECISION) + bias[None, :]
            class_ = first_class + member
            inside = (place < ROWS * W) & (top * W + place < H * W) & (class_ < classes)
            o_x = ((crop * classes + class_) * (H * W) + top * W + place) * C
            tl.store(out_ptr + o_x[:, None] + channel[None, :], x, mask=inside[:, None] & m_channel[None, :])


@dataclass(frozen=True)
class Config(LaunchConfig):
    """Launch config: rows and classes of a program, and what each step of its two products takes.

    Of the first product, `pixels` and `features` a step; of the second, `patches` (pixels x classes) and
    output channels.
    """

    rows: int
    classes: int
    pixels: int
    features: int
    patches: int
    channels: int
    num_warps: int
    num_stages: int


@cache
def default_config(size: Size, dtype: torch.dtype, capability: int) -> Config:
    """A config that fits every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
    rows = min(8, triton.next_power_of_2(size.height))
    channels = min(max(16, triton.next_power_of_2(size.channels_out)), 128)
    if dtype == torch.float32:
        return Config(rows, 16, 32, 32, 32, min(channels, 64), num_warps=8, num_stages=1)
    return Config(rows, 16, 64, 64, 64, channels, num_warps=4, num_stages=3)


def candidates(size: Size, dtype: torch.dtype, capability: int) -> tuple[Config, ...]:
    """Configs worth timing on GPUs of a compute capability, the default first."""
    default = default_config(size, dtype, capability)
    if dtype == torch.float32:
        others = grid(default, rows=(8, 16), patches=(16, 32), channels=(32, 64), num_stages=(1, 2))
        return default_first(default, others)
    tiles = [
        tiled
        for blocks, num_warps in ((64, 4), (128, 8))
        for tiled in grid(default, pixels=(blocks,), patches=(blocks,), num_warps=(num_warps,))
    ]
    choices = {"rows": (4, 8, 16), "classes": (16, 32), "num_stages": (2, 3)}
    return default_first(default, [config for tiled in tiles for config in grid(tiled, **choices)])


def problem(size: Size, dtype: torch.dtype, input_precision: str, crop_classes: int) -> Problem:
    """What a measured config is found by."""
    sizes = {"height": size.height, "width": size.width, "channels": size.channels_out}
    return Problem.of(
        "embed_cost_volume", "single_prompt", Config, dtype, input_precision, crop_classes, **sizes
    )


def choose_config(size: Size, image: Tensor, classes: int, input_precision: str) -> Config:
    """The config for `image [B, HW, F]` and so many classes."""
    return choose(
        problem(size, image.dtype, input_precision, len(image) * classes),
        image.device,
        lambda capability: default_config(size, image.dtype, capability),
    )


def launch(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: Size,
    input_precision: str,
    config: Config,
) -> Tensor:
    """`[B, t, HW, C]` of `image [B, HW, F]` and `text [B or 1, t, 1, F]`, whose features are contiguous.

    Nothing is checked.

    Args:
        weight: `[C, 7, 7, 1]`, contiguous.
        bias: `[C]`.
    """
    (B, HW, F), t = image.shape, text.shape[1]
    programs = triton.cdiv(size.height, config.rows) * triton.cdiv(t, config.classes) * B
    places = (config.rows + 6) * (size.width + 3) + 3
    out = image.new_empty((B, t, HW, size.channels_out))
    embed_kernel[(programs,)](
        image,
        text,
        weight,
        bias,
        image.new_empty((programs, places, config.classes)),
        out,
        t,
        *image.stride(),
        *text.expand(B, -1, -1, -1).stride()[:2],
        **_constants(size, F, input_precision, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return out


def tunable(workload: Workload) -> Tunable:
    """The kernel at a workload's sizes."""
    w, (B, t, HW, C), F = workload, workload.state, workload.features
    size = Size(w.height, w.width, 1, C, taps=7)

    def make_inputs(device: torch.device) -> tuple[Tensor, ...]:
        # Unit vectors; of an image, laid out as CLIP's are.
        image = w.normal(device, B, F, HW, scale=F**-0.5).transpose(1, 2)
        text = w.normal(device, 1, t, 1, F, scale=F**-0.5)
        return image, text, random_weight(w, size, device), w.normal(device, C)

    def run(inputs: Sequence[Tensor], config: Config) -> Sequence[Tensor]:
        image, text, weight, bias = inputs
        return (launch(image, text, weight, bias, size, w.input_precision, config),)

    wanted = problem(size, w.dtype, w.input_precision, w.crop_classes)
    return Tunable(wanted, candidates(size, w.dtype, w.capability), make_inputs, run)


def compile_targets(capability: int) -> list[CompileTarget]:
    """The kernel at the sizes of v2."""
    size = Size(24, 24, 1, 128, taps=7)
    precisions = [*((dtype, "ieee") for dtype in DTYPES), (torch.float32, "tf32x3")]
    return [_compile_target(size, dtype, capability, precision) for dtype, precision in precisions]


def _compile_target(size: Size, dtype: torch.dtype, capability: int, input_precision: str) -> CompileTarget:
    config = default_config(size, dtype, capability)
    pointers = ("image_ptr", "text_ptr", "weight_ptr", "bias_ptr", "cost_ptr", "out_ptr")
    strides = ("image_stride_crop", "image_stride_feature", "text_stride_crop", "text_stride_class")
    uses_mma = dtype != torch.float32 or input_precision != "ieee"
    return CompileTarget(
        name=f"{DTYPES[dtype]}{'' if input_precision == 'ieee' else ' ' + input_precision}",
        kernel=embed_kernel,
        signature={
            **dict.fromkeys(pointers, f"*{DTYPES[dtype]}"),
            **dict.fromkeys(("classes", *strides), "i32"),
        },
        constexprs={
            "image_stride_pixel": 1,  # features come as [B, F, HW]
            **_constants(size, 768, input_precision, config),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=strides,
        expects_mma=("wgmma" if capability == 90 and dtype != torch.float32 else "mma") if uses_mma else None,
    )


def _constants(size: Size, features: int, input_precision: str, config: Config) -> dict[str, Any]:
    return {
        "H": size.height,
        "W": size.width,
        "F": features,
        "C": size.channels_out,
        "PRECISION": input_precision,
        "ROWS": config.rows,
        "CLASSES": config.classes,
        "BLOCK_P": config.pixels,
        "BLOCK_K": config.features,
        "BLOCK_M": config.patches,
        "BLOCK_N": config.channels,
    }
