"""Tensor descriptors, which the copy engine of GPUs from compute capability 9.0 on (TMA) reads and writes by.

They are made on the host and passed to a kernel by value: no global allocator is set, and no memory is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes, of the start and of all strides
LIMIT = 2**40  # bytes, of a stride
SIDE = 256  # elements of a block in one dimension


def fits(x: Tensor, block: Sequence[int]) -> bool:
    """Check that a descriptor of `x` in blocks of this shape can be made."""
    strides = [stride * x.element_size() for stride in x.stride()]
    return (
        x.data_ptr() % ALIGNMENT == 0
        and x.stride(-1) == 1
        and all(0 < stride < LIMIT and stride % ALIGNMENT == 0 for stride in strides[:-1])
        and all(side <= SIDE for side in block)
        and block[-1] * x.element_size() >= ALIGNMENT
    )


def describe(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """The descriptor of `x` in blocks of this shape; what lies outside of x reads as 0 and is not written."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))
