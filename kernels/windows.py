"""Shifted windows as index arithmetic, and LayerNorm: what the kernels of a window-attention block share.

Window order lays the windows of the cyclically shifted image one behind the other, row by row; it is that of
`catseg_fast.reference.window_attention.partition_windows` after a roll by (-shift, -shift).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)  # of every LayerNorm, torch's default


class Windows(NamedTuple):
    """Shifted windows of a feature map, all in positions."""

    height: int
    width: int
    window: int
    shift: int


@triton.jit
def token_position(i, H: tl.constexpr, W: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Position y * W + x in the image of token `i` in window order."""
    w, j = i // (WINDOW * WINDOW), i % (WINDOW * WINDOW)
    y = w // (W // WINDOW) * WINDOW + j // WINDOW + SHIFT
    x = w % (W // WINDOW) * WINDOW + j % WINDOW + SHIFT
    y = tl.where(y >= H, y - H, y)
    x = tl.where(x >= W, x - W, x)
    return y * W + x


@triton.jit
def token_region(j, last_row, last_column, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Which of four regions token `j` of a window belongs to; tokens of two regions are not neighbours.

    Only the last windows of a row or column hold patches from opposite borders.
    """
    below = last_row & (j // WINDOW >= WINDOW - SHIFT)
    right = last_column & (j % WINDOW >= WINDOW - SHIFT)
    return below.to(tl.int32) * 2 + right.to(tl.int32)


@triton.jit
def normalise(x, inside, C: tl.constexpr):
    """LayerNorm without affine part of fp32 rows `[n, C padded]`, zero where not `inside`."""
    mean = tl.sum(x, 1) * (1.0 / C)
    x = tl.where(inside[None, :], x - mean[:, None], 0.0)
    return x * tl.math.rsqrt(tl.sum(x * x, 1) * (1.0 / C) + EPS)[:, None]
