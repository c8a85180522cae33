"""bfloat16 in Triton's interpreter.

The interpreter holds bf16 numbers as 16-bit integers, and computes with these integers: sums, products and
`tl.dot` are wrong. Its conversions cut numbers off, or lose the carry of a mantissa. Inside `as_on_gpu`, an
operation converts bf16 to fp32, computes as it does for fp32, and rounds a bf16 result to the nearest number,
ties to even. `tl.dot` adds up in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

NAN = np.uint16(0x7FFF)  # what a GPU converts NaN to


def decode(bits: Any) -> Any:
    """Return bf16 numbers, given as 16-bit integers, in fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def encode(numbers: Any) -> Any:
    """Return fp32 numbers rounded to bf16, as 16-bit integers."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32).reshape(numbers.shape)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), NAN, rounded)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return TensorHandle(decode(handle.data), tl.float32) if _is_bf16(handle) else handle


def _rounded(handle: TensorHandle) -> TensorHandle:
    """Return an fp32 result in bf16; comparisons, which are bool, stay."""
    if handle.data.dtype == np.bool_:
        return handle
    return TensorHandle(encode(handle.data), tl.bfloat16)


def _in_fp32(compute: Callable[..., Any], round_result: bool = True) -> Callable[..., Any]:
    """An operation on handles, with those in bf16 converted."""

    def computed(self: Any, *arguments: Any) -> Any:
        if not any(map(_is_bf16, arguments)):
            return compute(self, *arguments)
        result = compute(self, *map(_widened, arguments))
        return _rounded(result) if round_result else result

    return computed


def _cast(cast: Callable[..., Any]) -> Callable[..., Any]:
    def converted(self: Any, source: Any, kind: Any) -> Any:
        if not _is_bf16(source) and kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        source = _widened(source)
        if kind.scalar == tl.bfloat16:
            return TensorHandle(encode(source.data.astype(np.float32)), tl.bfloat16)
        return source if kind.scalar == tl.float32 else cast(self, source, kind)

    return converted


def _convert(convert: Callable[..., Any]) -> Callable[..., Any]:
    def converted(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if rounding in (None, ir.ROUNDING_MODE.RTNE) and tl.bfloat16 in (source.dtype.scalar, kind.scalar):
            return self.cast_impl(source, kind)
        return convert(self, source, kind, rounding)

    return converted


def _sum(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Sums in fp32; a GPU rounds partial sums to bf16, in an order of its own."""

    def reduced(self: Any, x: Any) -> Any:
        if not _is_bf16(x.handle):
            return reduce(self, x)
        total = np.sum(decode(x.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(encode(total), x.dtype)

    return reduced


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let the interpreter compute with bf16 numbers as a GPU does."""
    original = interpreter.InterpreterBuilder
    replaced: dict[Any, dict[str, Any]] = {
        InterpreterBuilder: {
            "binary_op": _in_fp32(original.binary_op),
            "unary_op": _in_fp32(original.unary_op),
            "create_fma": _in_fp32(original.create_fma),
            "create_clampf": _in_fp32(original.create_clampf),
            "create_dot": _in_fp32(original.create_dot, round_result=False),
            "cast_impl": _cast(original.cast_impl),
            "create_fp_to_fp": _convert(original.create_fp_to_fp),
            "get_bf16": lambda self, value: TensorHandle(encode(np.array([value])), tl.bfloat16),
        },
        ReduceOps: {"sum": _sum(ReduceOps.sum)},
    }
    before = {
        (owner, name): vars(owner).get(name) for owner, functions in replaced.items() for name in functions
    }
    for owner, functions in replaced.items():
        for name, function in functions.items():
            setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in before.items():
            if function is None:
                delattr(owner, name)
            else:
                setattr(owner, name, function)
