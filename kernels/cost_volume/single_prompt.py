"""Cost volume of one prompt per class and its 7x7 convolution, in one kernel.

    cost[b, t, i] = image[b, i] . text[b, t]        x[b, t] = conv7x7(cost[b, t]) + bias, to C channels

A program takes a group of classes and a band of rows of one crop. It writes the cost of the band and of three
rows on either side to its own scratch memory, classes last and with zeros around the map; then it reads the
scratch memory back, shifted by each of the 49 taps, as the left operand of a second matrix product. As
classes are adjacent and zeros surround the map, a read takes 16 bytes at a time and needs no mask per tap.
Programs compute the overlap of bands twice, so that none waits for another. The scratch memory, of B t HW
numbers and the overlap, stays in cache; patches `[B*t*HW, 49]` never reach memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.cost_volume.convolution import Size
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig, default_first, grid
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.products import add_after


@triton.jit(do_not_specialize=["classes"])
def single_prompt_kernel(
    image_ptr,  # [B, HW, F]
    text_ptr,  # [B or 1, t, F]
    weight_ptr,  # [C, 49]
    bias_ptr,  # [C]
    cost_ptr,  # [programs, PLACES, CLASSES], scratch
    out_ptr,  # [B, t, HW, C], output
    classes,  # t
    image_stride_b,
    image_stride_p,
    image_stride_f,
    text_stride_b,
    text_stride_t,
    H: tl.constexpr,
    W: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a band
    CLASSES: tl.constexpr,  # classes of a group
    PIXELS: tl.constexpr,  # pixels per step of the first product
    FEATURES: tl.constexpr,  # features per step
    PATCHES: tl.constexpr,  # pixels x classes per step of the second product
    CHANNELS: tl.constexpr,  # output channels per step
    PRECISION: tl.constexpr,
):
    BANDS: tl.constexpr = (H + ROWS - 1) // ROWS
    BAND: tl.constexpr = (ROWS + 6) * W
    # The same three zeros end a row and begin the next one.
    PITCH: tl.constexpr = W + 3
    PLACES: tl.constexpr = (ROWS + 6) * PITCH + 3
    program = tl.program_id(0)
    groups = tl.cdiv(classes, CLASSES)
    # Programs that share text are consecutive.
    top = program % BANDS * ROWS
    first_class = program // BANDS % groups * CLASSES
    crop = (program // (BANDS * groups)).to(tl.int64)
    o_class = tl.arange(0, CLASSES)

    k = tl.arange(0, FEATURES)
    text_class = tl.minimum(first_class + o_class, classes - 1)  # beyond the last, nothing is stored
    p_text = text_ptr + crop * text_stride_b + text_class.to(tl.int64)[None, :] * text_stride_t
    p_cost = cost_ptr + program.to(tl.int64) * (PLACES * CLASSES) + o_class[None, :]
    for start in range(0, BAND, PIXELS):
        place = start + tl.arange(0, PIXELS)
        pixel = (top - 3) * W + place
        m_pixel = (pixel >= 0) & (pixel < H * W)
        p_image = image_ptr + crop * image_stride_b + pixel[:, None] * image_stride_p
        cost = tl.zeros((PIXELS, CLASSES), tl.float32)
        for feature in range(0, F, FEATURES):
            m_feature = feature + k < F
            m_image = m_pixel[:, None] if F % FEATURES == 0 else m_pixel[:, None] & m_feature[None, :]
            m_text = None if F % FEATURES == 0 else m_feature[:, None]
            image = tl.load(p_image + (feature + k)[None, :] * image_stride_f, mask=m_image, other=0.0)
            text = tl.load(
                p_text + (feature + k)[:, None], mask=m_text, other=None if F % FEATURES == 0 else 0.0
            )
            cost = tl.dot(image, text, cost, input_precision=PRECISION)
        o_cost = (place // W * PITCH + 3 + place % W)[:, None] * CLASSES
        tl.store(p_cost + o_cost, cost, mask=(place < BAND)[:, None])
    BORDER: tl.constexpr = triton.next_power_of_2((ROWS + 7) * 3)
    border = tl.arange(0, BORDER)
    o_border = (border // 3 * PITCH + border % 3)[:, None] * CLASSES
    zeros = tl.zeros((BORDER, CLASSES), cost_ptr.dtype.element_ty)
    tl.store(p_cost + o_border, zeros, mask=(border < (ROWS + 7) * 3)[:, None])
    tl.debug_barrier()  # all of the program's stores before its loads

    tap = tl.arange(0, 64)
    m_tap = tap < 49
    o_tap = (tap // 7 * PITCH + tap % 7)[None, :] * CLASSES
    p_cost = cost_ptr + program.to(tl.int64) * (PLACES * CLASSES)
    for first_channel in range(0, C, CHANNELS):
        channel = first_channel + tl.arange(0, CHANNELS)
        m_channel = channel < C
        weight = tl.load(
            weight_ptr + channel[:, None] * 49 + tap[None, :],
            mask=m_channel[:, None] & m_tap[None, :],
            other=0.0,
        )
        bias = tl.load(bias_ptr + channel, mask=m_channel, other=0.0).to(tl.float32)
        for start in range(0, ROWS * W * CLASSES, PATCHES):
            row = start + tl.arange(0, PATCHES)
            place, member = row // CLASSES, row % CLASSES
            o_patch = (place // W * PITCH + place % W) * CLASSES + member
            m_patch = (place < ROWS * W)[:, None] & m_tap[None, :]
            patch = tl.load(p_cost + o_patch[:, None] + o_tap, mask=m_patch, other=0.0, cache_modifier=".ca")
            x = tl.dot(patch, tl.trans(weight), input_precision=PRECISION)
            x = add_after(x, bias[None, :], weight_ptr.dtype.element_ty)
            class_ = first_class + member
            inside = (place < ROWS * W) & (top * W + place < H * W) & (class_ < classes)
            o_x = ((crop * classes + class_) * (H * W) + top * W + place) * C
            tl.store(out_ptr + o_x[:, None] + channel[None, :], x, mask=inside[:, None] & m_channel[None, :])


@dataclass(frozen=True)
class SinglePromptConfig(LaunchConfig):
    """Launch config: rows and classes per program, and the steps of its two products.

    A step of the first product has `pixels` and `features`, a step of the second `patches` (pixels x classes)
    and `channels` of the output.
    """

    rows: int
    classes: int
    pixels: int
    features: int
    patches: int
    channels: int
    num_warps: int
    num_stages: int


MULTIPROCESSORS = 132  # of H100 and H200


@cache
def default_config(capability: int, problem: Problem) -> SinglePromptConfig:
    """Return a config that fits every GPU.

    With bands of 4 rows, 2.5 times as many rows of costs are computed, and 5 crops of 64 classes have 120
    programs. For few classes, bands are narrower, as long as there are multiprocessors for them.
    """
    rows = min(4, triton.next_power_of_2(problem.size("height")))
    while rows > 1 and 2 * programs(problem.crops, problem.classes, problem.size("height"), rows) <= (
        MULTIPROCESSORS
    ):
        rows //= 2
    return _config(problem, rows)


def interpreter_config(problem: Problem) -> SinglePromptConfig:
    """Return a config with few, large programs."""
    return _config(problem, min(8, triton.next_power_of_2(problem.size("height"))))


def _config(problem: Problem, rows: int) -> SinglePromptConfig:
    channels = min(max(16, triton.next_power_of_2(problem.size("channels"))), 128)
    if problem.dtype == "fp32":
        return SinglePromptConfig(rows, 16, 32, 32, 32, min(channels, 64), num_warps=8, num_stages=1)
    return SinglePromptConfig(rows, 16, 64, 64, 64, channels, num_warps=4, num_stages=3)


def candidates(capability: int, problem: Problem) -> tuple[SinglePromptConfig, ...]:
    """Configs worth timing, the default first; the same for all compute capabilities."""
    default = default_config(capability, problem)
    if problem.dtype == "fp32":
        others = grid(default, rows=(4, 8), patches=(16, 32), channels=(32, 64), num_stages=(1, 2))
        return default_first(default, others)
    tiles = [
        tiled
        for blocks, num_warps in ((64, 4), (128, 8))
        for tiled in grid(default, pixels=(blocks,), patches=(blocks,), num_warps=(num_warps,))
    ]
    choices = {"rows": (2, 4, 8), "classes": (16, 32), "num_stages": (2, 3)}
    return default_first(default, [config for tiled in tiles for config in grid(tiled, **choices)])


def programs(crops: int, classes: int, height: int, rows: int, group: int = 16) -> int:
    """Return the number of programs of a launch with bands of `rows` rows and groups of `group` classes."""
    return crops * triton.cdiv(classes, group) * triton.cdiv(height, rows)


def problem(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor, size: Size, *, input_precision: str
) -> Problem:
    """The sizes and types by which a measured config is found."""
    sizes = {"height": size.height, "width": size.width, "channels": size.channels_out}
    return Problem.of(
        "embed_cost_volume", "single_prompt", SinglePromptConfig, image, input_precision, text.shape[1],
        **sizes,
    )  # fmt: skip


def launch(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: Size,
    *,
    input_precision: str,
    config: SinglePromptConfig,
) -> Tensor:
    """Return `[B, t, HW, C]` from `image [B, HW, F]` and `text [B or 1, t, 1, F]` with contiguous features.

    Arguments are not checked.

    Args:
        weight: `[C, 7, 7, 1]`, contiguous.
        bias: `[C]`.
    """
    (B, HW, F), t = image.shape, text.shape[1]
    grid_size = programs(B, t, size.height, config.rows, config.classes)
    places = (config.rows + 6) * (size.width + 3) + 3
    scratch = image.new_empty((grid_size, places, config.classes))
    out = image.new_empty((B, t, HW, size.channels_out))
    launcher.run(
        single_prompt_kernel, (grid_size,),
        image, text, weight, bias, scratch, out, t,
        *image.stride(), *text.expand(B, -1, -1, -1).stride()[:2],
        H=size.height, W=size.width, F=F, C=size.channels_out, ROWS=config.rows, CLASSES=config.classes,
        PIXELS=config.pixels, FEATURES=config.features, PATCHES=config.patches, CHANNELS=config.channels,
        PRECISION=input_precision, config=config,
    )  # fmt: skip
    return out


KERNEL = Kernel(launch, problem, default_config, candidates, interpreter_config)
