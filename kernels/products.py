"""Functions on results of matrix products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_after(product, addend, dtype: tl.constexpr):
    """Return `product + addend`; in fp32, the product is summed up before the addend is added.

    Triton compiles `tl.dot(a, b) + addend` to a sum that starts at the addend. In fp32, each step is then
    rounded like a number of the addend's size: an addend larger than the product costs precision.
    """
    if dtype == tl.float32:
        return tl.fma(product, 1.0, addend)
    return product + addend
