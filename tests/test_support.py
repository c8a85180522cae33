"""The tests' own helpers: what they are to find, they find."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from support.accuracy import assert_classes_are_apart

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on a GPU")


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        (lambda x: x.cumsum(dim=1), "class 0 changes other classes"),
        (lambda x: x + x.flip(1), "class 0 changes other classes"),
        (torch.zeros_like, "class 0 does not depend on its input"),
        (lambda x: x + torch.rand(1), "two runs differ"),
    ],
)
def test_finds_classes_that_meet(op: Callable[[Tensor], Tensor], fault: str) -> None:
    x = torch.ones(2, 3, 4)
    assert_classes_are_apart(torch.exp, x)
    with pytest.raises(AssertionError, match=fault):
        assert_classes_are_apart(op, x)


@triton.jit
def _largest(a, b):
    return tl.max(a * b, axis=0)


@triton.jit
def _product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr, _largest(x, x))
    tl.store(y_ptr + 1, _largest(x, x + 1))


def products(largest: int) -> list[int]:
    x, y = torch.tensor([1, largest], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    _product_kernel[(1,)](x, y, BLOCK=2)
    return y.tolist()


@interpreted
def test_a_launch_replaces_what_all_its_functions_call() -> None:
    for _ in range(2):
        assert products(7) == [49, 56]


@interpreted
@pytest.mark.usefixtures("overflow_checks")
def test_overflow_is_found_where_it_is_looked_for() -> None:
    assert products(46340) == [46340**2, 46340 * 46341]
    with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        products(46341)
