"""Checks of the arguments of both ops of the class attention, and the sizes that they support."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from catseg_fast.kernels.launch.checks import check_like, check_runnable

MAX_CHANNELS = 256
MAX_HEAD = 64  # channels; the sums of a head with 128 do not fit in registers, and take minutes to compile


def unsupported(channels: int, heads: int) -> str | None:
    """Return why the kernels cannot run a layer of these sizes; None if they can."""
    if channels % 16 or channels > MAX_CHANNELS:
        return f"{channels} channels; expected a multiple of 16 up to {MAX_CHANNELS}"
    if channels > MAX_HEAD * heads:
        return f"{channels} channels in {heads} heads; expected at most {MAX_HEAD} per head"
    return None


def check_input(
    x: Tensor,
    text_name: str,
    text: Tensor | None,
    heads: int,
    resolution: Sequence[int],
    pooling: Sequence[int],
    input_precision: str,
) -> None:
    """Check x, its part of the text guidance, and the numbers that both ops take."""
    check_runnable("x", x, input_precision)
    height, width = resolution
    if x.ndim != 4 or 0 in x.shape or x.shape[2] != height * width:
        expected = f"[B, t, {height * width}, C] for resolution {height}x{width}, with B, t and C above 0"
        raise ValueError(f"x: has shape {list(x.shape)}; expected {expected}")
    C = x.shape[3]
    if reason := unsupported(C, heads):
        raise ValueError(f"x, heads: {reason}")
    if C % heads:
        raise ValueError(f"heads: {heads} do not divide {C} channels")
    if text is not None:
        check_like(text_name, text, ((1, x.shape[0]), x.shape[1], C), x)
        if text.stride(-1) != 1:
            raise ValueError(f"{text_name}: has strides {text.stride()}; expected contiguous channels")
    if pooling[0] > height or pooling[1] > width:
        raise ValueError(f"pooling: {pooling[0]}x{pooling[1]} is larger than the resolution {height}x{width}")


def check_weights(x: Tensor, **weights: tuple[Tensor, tuple[int, ...]]) -> None:
    """Check that weights have these shapes, the type and device of x, and are contiguous."""
    for name, (weight, shape) in weights.items():
        check_like(name, weight, shape, x)
        if not weight.is_contiguous():
            raise ValueError(f"{name}: has strides {weight.stride()}; expected a contiguous tensor")


def check_sums(
    x: Tensor,
    key_value: Tensor | None,
    key_sum: Tensor | None,
    heads: int,
    resolution: Sequence[int],
    pooling: Sequence[int],
    may_be_shared: bool,
) -> None:
    """Check sums over classes, if given, which may have one value for all positions if `may_be_shared`."""
    d, positions = x.shape[3] // heads, (x.shape[0], pooled_positions(resolution, pooling))
    named = {"key_value": (key_value, (heads, d, d)), "key_sum": (key_sum, (heads, d))}
    for name, (sums, shape) in named.items():
        if sums is None:
            continue
        if sums.shape != (*positions, *shape) and not (may_be_shared and sums.shape == shape):
            raise ValueError(f"{name}: has shape {list(sums.shape)}; expected {[*positions, *shape]}")
        if (sums.dtype, sums.device) != (torch.float32, x.device) or not sums.is_contiguous():
            raise ValueError(
                f"{name}: is {sums.dtype} on {sums.device} with strides {sums.stride()}; "
                f"expected a contiguous torch.float32 on {x.device}"
            )


def pooled_positions(resolution: Sequence[int], pooling: Sequence[int]) -> int:
    """Return the number of pooled positions, hw."""
    return (resolution[0] // pooling[0]) * (resolution[1] // pooling[1])
