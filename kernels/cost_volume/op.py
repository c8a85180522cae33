"""Cost volume and its 7x7 convolution (CAT-Seg paper, section 3.2): `stages.embed_cost_volume`.

For unit image features `[B, HW, F]` and unit text features `[B or 1, t, P, F]`, of B crops, t classes and P
prompts:

    cost[b, t, i, p] = image[b, i] . text[b, t, p]        x = conv7x7(cost) + bias, from P channels to C

Of one prompt a class, one kernel does both (`single_prompt.py`). Of more, the first kernel is one matrix
product a crop, of all pixels with all prompts, and writes the cost volume of this chunk channels last,
`[B, t, HW, P]`; the second is `convolution.py`'s. Never materialised are the cost volume of all classes, its
permuted copies, and the patches `[B*t, 49 P, HW]`.

The op computes in the features' type whatever autocast says, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.engine.folding import Plan
from catseg_fast.kernels import convolution
from catseg_fast.kernels.convolution import Size
from catseg_fast.kernels.cost_volume import single_prompt
from catseg_fast.kernels.launch import configs as tuning
from catseg_fast.kernels.launch.checks import DTYPES, check_like, check_runnable
from catseg_fast.kernels.launch.compile_target import CompileTarget
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.tunable import Tunable, Workload


@triton.jit(do_not_specialize=["classes"])
def cost_kernel(
    image_ptr,  # [B, HW, F]
    text_ptr,  # [B or 1, t, P, F]
    cost_ptr,  # [B, t, HW, P], output
    classes,  # t
    image_stride_crop,
    image_stride_pixel,
    image_stride_feature,
    text_stride_crop,
    text_stride_class,
    text_stride_prompt,
    HW: tl.constexpr,
    P: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # classes x prompts
    BLOCK_K: tl.constexpr,  # features a step
):
    TILES: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
    columns = tl.cdiv(classes * P, BLOCK_N)
    # Programs that share text come one behind the other.
    pixel = tl.program_id(0) % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(0) // TILES % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    crop = (tl.program_id(0) // (TILES * columns)).to(tl.int64)
    m_pixel, m_column = pixel < HW, column < classes * P
    column = tl.minimum(column, classes * P - 1)  # text beyond the last is not stored
    class_, prompt = (column // P).to(tl.int64), column % P

    k = tl.arange(0, BLOCK_K)
    p_image = image_ptr + crop * image_stride_crop + pixel[:, None] * image_stride_pixel
    p_text = (
        text_ptr
        + crop * text_stride_crop
        + (class_ * text_stride_class + prompt * text_stride_prompt)[None, :]
    )
    accumulator = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, F, BLOCK_K):
        feature = start + k
        m_image = m_pixel[:, None] if F % BLOCK_K == 0 else m_pixel[:, None] & (feature < F)[None, :]
        m_text = None if F % BLOCK_K == 0 else (feature < F)[:, None]
        image = tl.load(p_image + feature[None, :] * image_stride_feature, mask=m_image, other=0.0)
        text = tl.load(p_text + feature[:, None], mask=m_text, other=None if F % BLOCK_K == 0 else 0.0)
        accumulator = tl.dot(image, text, accumulator, input_precision=PRECISION)

    o_cost = ((crop * classes + class_) * (HW * P) + prompt)[None, :] + pixel[:, None] * P
    tl.store(cost_ptr + o_cost, accumulator, mask=m_pixel[:, None] & m_column[None, :])


@dataclass(frozen=True)
class Config(LaunchConfig):
    """Launch config of the first kernel: pixels and classes x prompts of a program, features a step."""

    pixels: int
    columns: int
    features: int
    num_warps: int
    num_stages: int


@cache
def default_config(columns: int, dtype: torch.dtype) -> Config:
    """A config that fits every GPU, for the classes x prompts of a chunk."""
    columns = max(16, triton.next_power_of_2(columns))
    if dtype == torch.float32:
        return Config(64, min(columns, 64), 32, num_warps=8, num_stages=2)
    return Config(128, min(columns, 128), 64, num_warps=8, num_stages=3)


def candidates(columns: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Configs worth timing, the default first; the same for all compute capabilities."""
    default = default_config(columns, dtype)
    if dtype == torch.float32:
        return default_first(
            default,
            grid(default, pixels=(32, 64, 128), features=(16, 32), num_warps=(4, 8), num_stages=(1, 2)),
        )
    tiles = (
        (64, 64, 4),
        (64, 128, 4),
        (128, 64, 4),
        (128, 128, 4),
        (128, 128, 8),
        (128, 256, 8),
        (256, 128, 8),
    )
    others = [
        replace(tiled, pixels=pixels, columns=width, num_warps=num_warps)
        for pixels, width, num_warps in tiles
        for tiled in grid(default, features=(32, 64), num_stages=(3, 4))
    ]
    return default_first(default, others)


def problem(dtype: torch.dtype, input_precision: str, crop_classes: int, HW: int, prompts: int) -> Problem:
    """What a measured config of the first kernel is found by."""
    sizes = {"positions": HW, "prompts": prompts}
    return Problem.of("embed_cost_volume", "cost", Config, dtype, input_precision, crop_classes, **sizes)


def launch(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    input_precision: str,
) -> Tensor:
    """`embed_cost_volume` on tensors, whose features are contiguous in `text`. Nothing is checked.

    Args:
        weight: `[C, 7, 7, P]`, contiguous.
        bias: `[C]`.
    """
    (B, HW, _), (_, t, P, _) = image.shape, text.shape
    size = Size(height, width, P, len(weight), taps=7)
    if P == 1:
        single = single_prompt.choose_config(size, image, t, input_precision)
        return single_prompt.launch(image, text, weight, bias, size, input_precision, single)
    config = tuning.choose(
        problem(image.dtype, input_precision, B * t, HW, P),
        image.device,
        lambda _: default_config(t * P, image.dtype),
    )
    cost = launch_cost(image, text, input_precision, config)
    conv = convolution.choose_config("embed_cost_volume", size, cost, input_precision)
    x, _ = convolution.launch(cost, weight, size, conv, addend=bias, input_precision=input_precision)
    return x


def launch_cost(image: Tensor, text: Tensor, input_precision: str, config: Config) -> Tensor:
    """The cost volume `[B, t, HW, P]` of `image [B, HW, F]` and `text [B or 1, t, P, F]`."""
    (B, HW, F), (_, t, P, _) = image.shape, text.shape
    cost = image.new_empty((B, t, HW, P))
    cost_kernel[(triton.cdiv(HW, config.pixels) * triton.cdiv(t * P, config.columns) * B,)](
        image,
        text,
        cost,
        t,
        *image.stride(),
        *text.expand(B, -1, -1, -1).stride()[:3],
        **_constants(HW, P, F, input_precision, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return cost


@torch.library.custom_op("catseg_fast::embed_cost_volume", mutates_args=())
def _embed_cost_volume(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, input_precision: str
) -> Tensor:
    return launch(image, text, weight, bias, height, width, input_precision)


@_embed_cost_volume.register_fake
def _(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, input_precision: str
) -> Tensor:
    return image.new_empty((len(image), text.shape[1], image.shape[1], len(weight)))


def embed_cost_volume(
    plan: Plan, image: Tensor, text: Tensor, resolution: tuple[int, int], input_precision: str = "ieee"
) -> Tensor:
    """`stages.embed_cost_volume` on Triton kernels, any sizes.

    Args:
        plan: the folded weights, in the features' type; an `embed` that is channels last spares a copy.
        image: unit image features `[B, HW, F]`; fp16, bf16 or fp32.
        text: unit text features `[B or 1, t, P, F]`, of at least one class.
        resolution: (H, W).
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Returns:
        `[B, t, HW, C]`.

    Raises:
        ValueError: if an argument has a wrong shape, type or device.
        RuntimeError: if the GPU is too old.
    """
    height, width = resolution
    if image.ndim != 3 or image.shape[1] != height * width or not image.numel():
        raise ValueError(
            f"image: has shape {list(image.shape)}; wanted [B, {height * width}, F] with none of them 0, "
            f"for a resolution of {height}x{width}"
        )
    check_runnable("image", image, input_precision)
    if text.ndim != 4 or not text.numel():
        raise ValueError(f"text: has shape {list(text.shape)}; wanted [B or 1, t, P, F] with none of them 0")
    check_like("text", text, ((1, len(image)), text.shape[1], plan.prompts, image.shape[2]), image)
    check_like("plan.embed", plan.embed, (plan.channels, plan.prompts, 7, 7), image)
    weight = plan.embed.permute(0, 2, 3, 1).contiguous()
    text = text if text.stride(3) == 1 else text.contiguous()
    return _embed_cost_volume(image, text, weight, plan.embed_bias, height, width, input_precision)


def tunables(workload: Workload) -> list[Tunable]:
    """The kernels, for each number of prompts."""
    found = []
    for prompts in workload.prompts:
        if prompts == 1:
            found.append(single_prompt.tunable(workload))
        else:
            found += [_tunable_cost(workload, prompts), _tunable_convolution(workload, prompts)]
    return found


def _tunable_cost(workload: Workload, prompts: int) -> Tunable:
    w, (B, t, HW, _), F = workload, workload.state, workload.features

    def make_inputs(device: torch.device) -> tuple[Tensor, ...]:
        # Unit vectors; of an image, laid out as CLIP's are.
        image = w.normal(device, B, F, HW, scale=F**-0.5).transpose(1, 2)
        return image, w.normal(device, 1, t, prompts, F, scale=F**-0.5)

    def run(inputs: Sequence[Tensor], config: Config) -> Sequence[Tensor]:
        image, text = inputs
        return (launch_cost(image, text, w.input_precision, config),)

    wanted = problem(w.dtype, w.input_precision, w.crop_classes, HW, prompts)
    return Tunable(wanted, candidates(t * prompts, w.dtype), make_inputs, run)


def _tunable_convolution(workload: Workload, prompts: int) -> Tunable:
    w, (B, t, HW, C) = workload, workload.state
    size = Size(w.height, w.width, prompts, C, taps=7)

    def make_inputs(device: torch.device) -> tuple[Tensor, ...]:
        cost, bias = w.normal(device, B, t, HW, prompts, scale=0.2), w.normal(device, C)
        return cost, convolution.random_weight(w, size, device), bias

    def run(inputs: Sequence[Tensor], config: convolution.Config) -> Sequence[Tensor]:
        cost, weight, bias = inputs
        out, _ = convolution.launch(
            cost, weight, size, config, addend=bias, input_precision=w.input_precision
        )
        return (out,)

    return Tunable(
        convolution.problem("embed_cost_volume", size, w.dtype, w.input_precision, w.crop_classes),
        convolution.candidates(size, w.dtype, w.capability),
        make_inputs,
        run,
    )


def compile_targets(capability: int) -> list[CompileTarget]:
    """Both kernels at the sizes of v1, with 80 prompts."""
    size, targets = Size(24, 24, 80, 128, taps=7), []
    for dtype, precision in [*((dtype, "ieee") for dtype in DTYPES), (torch.float32, "tf32x3")]:
        targets += [
            _compile_target("cost", size, dtype, capability, precision),
            convolution.compile_target("conv", size, dtype, capability, precision, addend="bias"),
        ]
    return targets


def _compile_target(
    name: str, size: Size, dtype: torch.dtype, capability: int, input_precision: str
) -> CompileTarget:
    config = default_config(128 * size.channels_in, dtype)
    storage = f"*{DTYPES[dtype]}"
    strides = ("image_stride_crop", "image_stride_feature", "text_stride_crop", "text_stride_class")
    uses_mma = dtype != torch.float32 or input_precision != "ieee"
    return CompileTarget(
        name=f"{name} {DTYPES[dtype]}{'' if input_precision == 'ieee' else ' ' + input_precision}",
        kernel=cost_kernel,
        signature={
            **dict.fromkeys(("image_ptr", "text_ptr", "cost_ptr"), storage),
            **dict.fromkeys(("classes", *strides, "text_stride_prompt"), "i32"),
        },
        constexprs={
            "image_stride_pixel": 1,  # features come as [B, F, HW]
            **_constants(size.pixels, size.channels_in, 768, input_precision, config),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=(*strides, "text_stride_prompt"),
        expects_mma=("wgmma" if capability == 90 else "mma") if uses_mma else None,
    )


def _constants(HW: int, P: int, F: int, input_precision: str, config: Config) -> dict[str, Any]:
    return {
        "HW": HW,
        "P": P,
        "F": F,
        "PRECISION": input_precision,
        "BLOCK_P": config.pixels,
        "BLOCK_N": config.columns,
        "BLOCK_K": config.features,
    }
