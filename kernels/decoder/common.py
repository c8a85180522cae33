"""Device functions that the decoder's kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_channels(pointer, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load C numbers, padded to BLOCK_C and repeated to `[1, BLOCK_K]`.

    Each is loaded once: a load of `[1, BLOCK_K]` would fix a layout that suits none of the following steps.
    """
    c = tl.arange(0, BLOCK_C)
    values = tl.load(pointer + c) if C == BLOCK_C else tl.load(pointer + c, mask=c < C, other=0.0)
    repeated = tl.broadcast_to(values[None, :], (BLOCK_K // BLOCK_C, BLOCK_C))
    return tl.reshape(repeated, (1, BLOCK_K))


@triton.jit
def normalise(x, scale, shift):
    """Return relu(scale x + shift), computed in the type of scale and shift, in x's type; NaN stays NaN."""
    dtype = scale.dtype
    y = tl.fma(x.to(dtype), tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))
    return tl.maximum(y, tl.zeros((1, 1), dtype), propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@triton.jit
def again(x):
    """Return x of 16 bits for another product, at no cost in machine code.

    If several products read a value, Triton 3.8 computes it in the layout of the first product, and again in
    its own layout for the others: x would be normalised twice. To the compiler, the result is another value.
    """
    return x.to(tl.int16, bitcast=True).to(x.dtype, bitcast=True)


@triton.jit
def sum_rows(x, ROWS: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr):
    """Sum `x [ROWS, N]` to `[WARPS, 8, N]`, over the rows that one thread of a wgmma accumulator holds."""
    return tl.sum(tl.sum(tl.reshape(x, (ROWS // (16 * WARPS), WARPS, 2, 8, N)), 2), 0)


@triton.jit
def store_statistics(pointer, sums, squares, n, COUNT: tl.constexpr, CO: tl.constexpr):
    """Store a part's sums and squared deviations, from sums and sums of squares `[WARPS, 8, CO]`.

    The difference loses less precision than the map's 16 bits lose beside a mean of this size.
    """
    total = tl.sum(tl.sum(sums, 1), 0)
    deviation = tl.sum(tl.sum(squares, 1), 0) - total * total / COUNT
    tl.store(pointer + n, total)
    tl.store(pointer + CO + n, tl.maximum(deviation, 0.0))
