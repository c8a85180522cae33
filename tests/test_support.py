"""Helpers of the tests: they find the faults that they look for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from support import interpreter
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


@interpreted
@pytest.mark.parametrize("shape", [[8], [4, 1], [tl.constexpr(2), 16], tl.tuple([4, tl.constexpr(2)])])
@pytest.mark.parametrize("element", [tl.float16, tl.int1, tl.pointer_type(tl.int8)], ids=str)
def test_types_and_tensors_are_as_triton_constructs_them(element: Any, shape: Any) -> None:
    for _ in range(2):
        kind, expected = tl.block_type(element, shape), object.__new__(tl.block_type)
        interpreter.OWN[tl.block_type](expected, element, shape)
        assert kind == expected
        assert repr(vars(expected)) == repr({name: vars(kind)[name] for name in vars(expected)})
        for one in (kind, element):
            tensor, other = tl.tensor("handle", one), object.__new__(tl.tensor)
            interpreter.OWN[tl.tensor](other, "handle", one)
            described = [
                (x.handle, x.type, x.dtype, repr(x.numel), list(map(repr, x.shape))) for x in (tensor, other)
            ]
            assert described[0] == described[1]


@interpreted
@pytest.mark.parametrize("shape", [[3], [], [2, 0]])
def test_types_of_bad_shapes_are_refused(shape: Any) -> None:
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"power of 2|forbidden"):
            tl.block_type(tl.float16, shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_error_function_is_pythons(dtype: type) -> None:
    x = np.array([*np.linspace(-6, 6, 97), math.inf, -math.inf, -0.0], dtype)
    expected = np.array([math.erf(value) for value in x.tolist()], dtype)
    np.testing.assert_allclose(interpreter._erf(x), expected, rtol=np.finfo(dtype).eps, atol=0)
    assert math.isnan(interpreter._erf(np.array([math.nan], dtype))[0])
