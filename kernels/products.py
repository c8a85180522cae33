"""What comes after a matrix product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_after(product, addend, dtype: tl.constexpr):
    """`product + addend`, where a product in fp32 has been summed up before.

    Triton compiles `tl.dot(a, b) + addend` to a sum that starts at the addend. In fp32 that rounds each step
    like a number of the addend's size: an addend that is larger than the product costs precision.
    """
    if dtype == tl.float32:
        return tl.fma(product, 1.0, addend)
    return product + addend
