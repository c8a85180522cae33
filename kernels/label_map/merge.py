"""Probabilities of a picture from the logits of its sliding-window crops.

With N(r, s) the crops over a pixel (r, s), and `up` bilinear resizes from a crop's logits to its pixels:

    p(r, s) = (mean over n in N(r, s) of sigmoid(up(logits_n)) + whole(r, s)) / 2
    whole = the last crop's sigmoid(up(logits)), resized to R x S

Logits are `[N + 1, t, h, w]`, p is `[t, R, S]` in fp32. Probabilities of crops never reach memory. Positions
are exact, as they are computed from integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.label_map.resize import mix, sigmoid, taps
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig


@triton.jit
def _logit(p_map, row, column, m, W: tl.constexpr):
    return tl.load(p_map + row * W + column, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _crop(p_map, row, column, m, H: tl.constexpr, W: tl.constexpr, SIDE: tl.constexpr):
    """Return the probability at a pixel of a SIDE x SIDE crop with logits of H x W."""
    top, bottom, down = taps(row, H, SIDE)
    left, right, across = taps(column, W, SIDE)
    logit = mix(
        _logit(p_map, top, left, m, W),
        _logit(p_map, top, right, m, W),
        _logit(p_map, bottom, left, m, W),
        _logit(p_map, bottom, right, m, W),
        down,
        across,
    )
    return sigmoid(logit)


@triton.jit
def merge_kernel(
    logits_ptr,  # [N + 1, t, H, W]: of N crops, row by row, and of the whole picture
    out_ptr,  # [t, R, S] fp32
    logits_stride_b,
    logits_stride_t,
    H: tl.constexpr,  # of a crop's logits
    W: tl.constexpr,
    R: tl.constexpr,  # of the picture
    S: tl.constexpr,
    SIDE: tl.constexpr,  # pixels of a crop
    STRIDE: tl.constexpr,  # pixels from a crop to the next
    PIXELS: tl.constexpr,
):
    DOWN: tl.constexpr = (R - SIDE + STRIDE - 1) // STRIDE + 1  # crops in a column
    ACROSS: tl.constexpr = (S - SIDE + STRIDE - 1) // STRIDE + 1
    parts: tl.constexpr = (R * S + PIXELS - 1) // PIXELS
    t = (tl.program_id(0) // parts).to(tl.int64)
    pixel = tl.program_id(0) % parts * PIXELS + tl.arange(0, PIXELS)
    m = pixel < R * S
    row, column = pixel // S, pixel % S
    p_map = logits_ptr + t * logits_stride_t

    total = tl.zeros((PIXELS,), tl.float32)
    count = tl.zeros((PIXELS,), tl.float32)
    for n in tl.static_range(DOWN * ACROSS):
        r = row - tl.minimum(n // ACROSS * STRIDE, R - SIDE)
        s = column - tl.minimum(n % ACROSS * STRIDE, S - SIDE)
        inside = m & (r >= 0) & (r < SIDE) & (s >= 0) & (s < SIDE)
        crop = _crop(p_map, r, s, inside, H, W, SIDE)
        total += tl.where(inside, crop, 0.0)
        count += tl.where(inside, 1.0, 0.0)
        p_map += logits_stride_b

    top, bottom, down = taps(row, SIDE, R)
    left, right, across = taps(column, SIDE, S)
    whole = mix(
        _crop(p_map, top, left, m, H, W, SIDE),
        _crop(p_map, top, right, m, H, W, SIDE),
        _crop(p_map, bottom, left, m, H, W, SIDE),
        _crop(p_map, bottom, right, m, H, W, SIDE),
        down,
        across,
    )
    tl.store(out_ptr + t * (R * S) + pixel, (total / tl.maximum(count, 1) + whole) / 2, mask=m)


@dataclass(frozen=True)
class MergeConfig(LaunchConfig):
    """Launch config: pixels per program."""

    pixels: int = 256
    num_warps: int = 4


def default_config(device: torch.device) -> MergeConfig:
    """Return a config for any GPU; in the interpreter, one with few, large programs."""
    return MergeConfig(16384) if device.type == "cpu" else MergeConfig()


def launch(logits: Tensor, window: Sequence[int], config: MergeConfig) -> Tensor:
    """Return probabilities `[t, R, S]` of `logits [N + 1, t, h, w]`; window: (R, S, crop size, stride)."""
    (_, t, height, width), (rows, columns, side, stride) = logits.shape, window
    out = logits.new_empty((t, rows, columns), dtype=torch.float32)
    launcher.run(
        merge_kernel, (t * triton.cdiv(rows * columns, config.pixels),), logits, out, *logits.stride()[:2],
        H=height, W=width, R=rows, S=columns, SIDE=side, STRIDE=stride, PIXELS=config.pixels, config=config,
    )  # fmt: skip
    return out
