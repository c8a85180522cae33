"""Bilinear resizing without aligned corners, for the label map's kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def taps(position, size, resized):
    """Return the two positions of `size` around a position of `resized`, and the second's exact weight."""
    numerator = tl.maximum((2 * position + 1) * size - resized, 0)  # over 2 * resized
    first = numerator // (2 * resized)
    weight = (numerator - first * 2 * resized).to(tl.float32) / (2 * resized)
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def mix(top_left, top_right, bottom_left, bottom_right, down, across):
    """Bilinear interpolation."""
    upper = top_left * (1 - across) + top_right * across
    lower = bottom_left * (1 - across) + bottom_right * across
    return upper * (1 - down) + lower * down


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))
