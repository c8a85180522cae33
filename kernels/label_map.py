"""Label maps: a chunk's logits become probabilities of pixels and meet the best so far, all in one kernel.

With sliding-window crops n at corners (top_n, left_n) of the picture at R x S, bilinear resizes (corners not
aligned) up_n from a crop's logits to its pixels, and N(r, s) the crops over (r, s):

    p(r, s) = (mean over n in N(r, s) of sigmoid(up_n(logits_n)) + whole(r, s)) / 2
    whole = the last crop's sigmoid(up(logits)), resized to R x S
    score = p resized to H x W;  label = argmax over classes, the first of equal ones

and without a window, of one crop and its visible rows and columns, score = sigmoid(logits) resized to H x W. Logits
are `[B, t, h, w]`; scores and labels `[H, W]`. Each pixel gathers what it needs: no probability map of any size
reaches memory, so that memory does not grow with classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.checks import check_runnable
from catseg_fast.kernels.compile_target import CompileTarget

if TYPE_CHECKING:
    from catseg_fast.label_map import Readout


@triton.jit
def _taps(position, size, resized):
    """The two positions of `size` around a position of `resized`, and the second one's weight; exact."""
    numerator = tl.maximum((2 * position + 1) * size - resized, 0)  # over 2 * resized
    first = numerator // (2 * resized)
    weight = (numerator - first * 2 * resized).to(tl.float32) / (2 * resized)
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def _mix(top_left, top_right, bottom_left, bottom_right, down, across):
    """Bilinear interpolation."""
    upper = top_left * (1 - across) + top_right * across
    lower = bottom_left * (1 - across) + bottom_right * across
    return upper * (1 - down) + lower * down


@triton.jit
def _logit(p_map, row, column, m, WIDTH: tl.constexpr):
    return tl.load(p_map + row * WIDTH + column, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _crop(p_map, row, column, m, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr):
    """Probability at a pixel of a SIDE x SIDE crop with logits of HEIGHT x WIDTH."""
    top, bottom, down = _taps(row, HEIGHT, SIDE)
    left, right, across = _taps(column, WIDTH, SIDE)
    logit = _mix(
        _logit(p_map, top, left, m, WIDTH),
        _logit(p_map, top, right, m, WIDTH),
        _logit(p_map, bottom, left, m, WIDTH),
        _logit(p_map, bottom, right, m, WIDTH),
        down,
        across,
    )
    return _sigmoid(logit)


@triton.jit
def _merged(
    p_map,
    row,
    column,
    m,
    stride_b,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Probability at a pixel of the ROWS x COLUMNS picture, from all crops; p_map is the first crop's."""
    DOWN: tl.constexpr = (ROWS - SIDE + STRIDE - 1) // STRIDE + 1  # crops one under the other
    ACROSS: tl.constexpr = (COLUMNS - SIDE + STRIDE - 1) // STRIDE + 1
    total = tl.zeros(row.shape, tl.float32)
    count = tl.zeros(row.shape, tl.float32)
    for n in tl.static_range(DOWN * ACROSS):
        in_row = row - min(n // ACROSS * STRIDE, ROWS - SIDE)
        in_column = column - min(n % ACROSS * STRIDE, COLUMNS - SIDE)
        inside = m & (in_row >= 0) & (in_row < SIDE) & (in_column >= 0) & (in_column < SIDE)
        crop = _crop(p_map + n * stride_b, in_row, in_column, inside, HEIGHT, WIDTH, SIDE)
        total += tl.where(inside, crop, 0.0)
        count += tl.where(inside, 1.0, 0.0)
    top, bottom, down = _taps(row, SIDE, ROWS)
    left, right, across = _taps(column, SIDE, COLUMNS)
    p_whole = p_map + DOWN * ACROSS * stride_b
    whole = _mix(
        _crop(p_whole, top, left, m, HEIGHT, WIDTH, SIDE),
        _crop(p_whole, top, right, m, HEIGHT, WIDTH, SIDE),
        _crop(p_whole, bottom, left, m, HEIGHT, WIDTH, SIDE),
        _crop(p_whole, bottom, right, m, HEIGHT, WIDTH, SIDE),
        down,
        across,
    )
    return (total / count + whole) / 2
