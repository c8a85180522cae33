"""Tensor descriptors for the tensor memory accelerator (TMA) of GPUs from compute capability 9.0 on.

They are made on the host and passed to a kernel by value, without a global allocator or memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes, of the start and of all strides
LIMIT = 2**40  # bytes, of a stride
SIDE = 256  # elements of a block in one dimension


def fits(x: Tensor, block: Sequence[int]) -> bool:
    """Check whether a descriptor of `x` in blocks of this shape can be made."""
    strides = [stride * x.element_size() for stride in x.stride()]
    return (
        x.data_ptr() % ALIGNMENT == 0
        and x.stride(-1) == 1
        and all(0 < stride < LIMIT and stride % ALIGNMENT == 0 for stride in strides[:-1])
        and all(side <= SIDE for side in block)
        and block[-1] * x.element_size() >= ALIGNMENT
    )


def describe(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """Return the descriptor of `x` in blocks of this shape; outside of x, it reads 0 and does not write."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))
