"""Cost volume of several prompts per class, as one matrix product per crop.

    cost[b, t, i, p] = image[b, i] . text[b, t, p]

for image features `[B, HW, F]` and text features `[B or 1, t, P, F]`, all pixels by all prompts of a chunk.
It is written channels last, `[B, t, HW, P]`; permuted copies are never materialised.
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


@triton.jit(do_not_specialize=["classes"])
def cost_kernel(
    image_ptr,  # [B, HW, F]
    text_ptr,  # [B or 1, t, P, F]
    cost_ptr,  # [B, t, HW, P], output
    classes,  # t
    image_stride_b,
    image_stride_p,
    image_stride_f,
    text_stride_b,
    text_stride_t,
    text_stride_p,
    HW: tl.constexpr,
    P: tl.constexpr,
    F: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr,  # classes x prompts
    FEATURES: tl.constexpr,  # features per step
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (HW + PIXELS - 1) // PIXELS
    columns = tl.cdiv(classes * P, COLUMNS)
    # Programs that share text are consecutive.
    pixel = tl.program_id(0) % TILES * PIXELS + tl.arange(0, PIXELS)
    column = tl.program_id(0) // TILES % columns * COLUMNS + tl.arange(0, COLUMNS)
    crop = (tl.program_id(0) // (TILES * columns)).to(tl.int64)
    m_pixel, m_column = pixel < HW, column < classes * P
    column = tl.minimum(column, classes * P - 1)  # results beyond the last column are not stored
    class_, prompt = (column // P).to(tl.int64), column % P

    k = tl.arange(0, FEATURES)
    p_image = image_ptr + crop * image_stride_b + pixel[:, None] * image_stride_p
    p_text = text_ptr + crop * text_stride_b + (class_ * text_stride_t + prompt * text_stride_p)[None, :]
    accumulator = tl.zeros((PIXELS, COLUMNS), tl.float32)
    for start in range(0, F, FEATURES):
        feature = start + k
        m_image = m_pixel[:, None] if F % FEATURES == 0 else m_pixel[:, None] & (feature < F)[None, :]
        m_text = None if F % FEATURES == 0 else (feature < F)[:, None]
        image = tl.load(p_image + feature[None, :] * image_stride_f, mask=m_image, other=0.0)
        text = tl.load(p_text + feature[:, None], mask=m_text, other=None if F % FEATURES == 0 else 0.0)
        accumulator = tl.dot(image, text, accumulator, input_precision=PRECISION)

    o_cost = ((crop * classes + class_) * (HW * P) + prompt)[None, :] + pixel[:, None] * P
    tl.store(cost_ptr + o_cost, accumulator, mask=m_pixel[:, None] & m_column[None, :])


@dataclass(frozen=True)
class CostConfig(LaunchConfig):
    """Launch config: pixels and classes x prompts per program, features per step."""

    pixels: int
    columns: int
    features: int
    num_warps: int
    num_stages: int


@cache
def default_config(capability: int, problem: Problem) -> CostConfig:
    """Return a config that fits every GPU."""
    columns = max(16, triton.next_power_of_2(problem.classes * problem.size("prompts")))
    if problem.dtype == "fp32":
        return CostConfig(64, min(columns, 64), 32, num_warps=8, num_stages=2)
    return CostConfig(128, min(columns, 128), 64, num_warps=8, num_stages=3)


def candidates(capability: int, problem: Problem) -> tuple[CostConfig, ...]:
    """Configs worth timing, the default first; the same for all compute capabilities."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
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


def problem(image: Tensor, text: Tensor, *, input_precision: str) -> Problem:
    """The sizes and types by which a measured config is found."""
    sizes = {"positions": image.shape[1], "prompts": text.shape[2]}
    return Problem.of("embed_cost_volume", "cost", CostConfig, image, input_precision, text.shape[1], **sizes)


def launch(image: Tensor, text: Tensor, *, input_precision: str, config: CostConfig) -> Tensor:
    """Return the cost volume `[B, t, HW, P]` of `image [B, HW, F]` and `text [B or 1, t, P, F]`."""
    (B, HW, F), (_, t, P, _) = image.shape, text.shape
    cost = image.new_empty((B, t, HW, P))
    launcher.run(
        cost_kernel, (triton.cdiv(HW, config.pixels) * triton.cdiv(t * P, config.columns) * B,),
        image, text, cost, t, *image.stride(), *text.expand(B, -1, -1, -1).stride()[:3],
        HW=HW, P=P, F=F, PIXELS=config.pixels, COLUMNS=config.columns, FEATURES=config.features,
        PRECISION=input_precision, config=config,
    )  # fmt: skip
    return cost


KERNEL = Kernel(launch, problem, default_config, candidates)
