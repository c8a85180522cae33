"""Functions of kernels that the decoder's convolutions share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_channels(pointer, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """C numbers, filled up to BLOCK_C and repeated to `[1, BLOCK_K]`.

    Each is loaded once: a load of `[1, BLOCK_K]` would fix a layout that suits nothing that follows.
    """
    c = tl.arange(0, BLOCK_C)
    values = tl.load(pointer + c) if C == BLOCK_C else tl.load(pointer + c, mask=c < C, other=0.0)
    repeated = tl.broadcast_to(values[None, :], (BLOCK_K // BLOCK_C, BLOCK_C))
    return tl.reshape(repeated, (1, BLOCK_K))


@triton.jit
def normalise(x, scale, shift):
    """relu(scale x + shift) in the type of scale and shift, rounded to x's; NaN stays NaN."""
    dtype = scale.dtype
    y = tl.fma(x.to(dtype), tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))
    return tl.maximum(y, tl.zeros((1, 1), dtype), propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@triton.jit
def again(x):
    """x of 16 bits for one more product; the machine code has no trace of it.

    Where several products read a value, Triton 3.8 computes it in the first one's layout, and in its own for
    the others, so that x would be normalised twice. To the compiler, this is another x.
    """
    return x.to(tl.int16, bitcast=True).to(x.dtype, bitcast=True)


@triton.jit
def sum_rows(x, ROWS: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr):
    """`x [ROWS, N]` to `[WARPS, 8, N]`: sums of the rows that one thread of a wgmma accumulator has."""
    return tl.sum(tl.sum(tl.reshape(x, (ROWS // (16 * WARPS), WARPS, 2, 8, N)), 2), 0)


@triton.jit
def store_statistics(pointer, sums, squares, n, COUNT: tl.constexpr, CO: tl.constexpr):
    """Store a part's sums and squared deviations, from sums and sums of squares `[WARPS, 8, CO]`.

    What cancels in the difference is less than what the map's 16 bits lose beside a mean as large.
    """
    total = tl.sum(tl.sum(sums, 1), 0)
    deviation = tl.sum(tl.sum(squares, 1), 0) - total * total / COUNT
    tl.store(pointer + n, total)
    tl.store(pointer + CO + n, tl.maximum(deviation, 0.0))
