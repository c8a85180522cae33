"""Triton's interpreter, without work that takes most of its time and tests nothing of ours.

- At every launch, and at every call of a device function, it searches Triton's modules for functions to
  replace by its own.
- For every result it constructs and checks the type of a block, and wraps each of its sizes.
- It copies arguments that are in host memory to themselves.
- It calls Python for each number of an error function.
- It computes each sum and product of 32-bit integers once more in 64 bits, to check for overflow; but it
  fails only in debug mode, which is for the tests of large offsets.

On a GPU, `tl.maximum` and `tl.minimum` drop NaN unless they are told to propagate it. The interpreter of
Triton 3.6 always propagates it, so that a kernel that loses NaN would pass its tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

Arguments = tuple[Sequence[Any], Mapping[str, Any]]
OWN = {kind: kind.__init__ for kind in (tl.block_type, tl.tensor)}  # Triton's constructors


@contextmanager
def overflow_checks(enabled: bool) -> Iterator[None]:
    """Fail where a 32-bit integer overflows, or do not look for it."""
    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = replace(before, sanitize_overflow=enabled, debug=enabled)
    try:
        yield
    finally:
        builder.options = before


@contextmanager
def nan_as_on_gpu() -> Iterator[None]:
    """Let maxima and minima drop NaN unless they are told to propagate it."""
    builder = interpreter.InterpreterBuilder
    before = builder.create_maxnumf, builder.create_minnumf
    builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    try:
        yield
    finally:
        builder.create_maxnumf, builder.create_minnumf = before


@contextmanager
def quick() -> Iterator[None]:
    """Leave out what the interpreter does besides running the kernels; results are the same."""
    executor = interpreter.GridExecutor
    search, launch = interpreter._patch_lang, executor.__call__
    to_host, from_host = executor._init_args_hst, executor._restore_args_dev
    known: dict[frozenset[str], _Replacements] = {}
    replaced: set[frozenset[str]] = set()  # by the current launch

    @cache
    def modules(fn: Callable[..., Any]) -> frozenset[str]:
        return frozenset(x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core)

    def replace_once(fn: Callable[..., Any]) -> Any:
        names = modules(fn)
        if names in replaced:
            return None  # of a device function, for which nothing is restored
        if replaced:  # another device function's modules
            replaced.add(names)
            return search(fn)
        replaced.add(names)
        if names in known:
            known[names].apply()
        else:
            known[names] = _Replacements(search(fn))
        return known[names]

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()  # the end of the launch before has restored the functions
        launch(self, *args, **kwargs)

    def to_host_if_elsewhere(self: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        return (args, kwargs) if _on_host((*args, *kwargs.values())) else to_host(self, args, kwargs)

    of_scalar, equal = cache(interpreter._get_np_dtype), tl.dtype.__eq__

    def numpy_type(kind: Any) -> np.dtype[Any]:
        kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np.dtype(np.uint64) if isinstance(kind, tl.pointer_type) else of_scalar(kind)

    def from_host_if_elsewhere(self: Any, args: Sequence[Any], host: Sequence[Any], *rest: Any) -> None:
        if host is not args:
            from_host(self, args, host, *rest)

    changes: dict[Any, dict[str, Any]] = {
        interpreter: {
            "_patch_lang": replace_once,
            "_get_np_dtype": numpy_type,
            "np_erf_fp32": _erf,
            "np_erf_fp64": _erf,
        },
        executor: {
            "__call__": launch_anew,
            "_init_args_hst": to_host_if_elsewhere,
            "_restore_args_dev": from_host_if_elsewhere,
        },
        tl.dtype: {"__eq__": lambda self, other: self is other or equal(self, other)},
        tl.block_type: {"__init__": _construct_once()},
        tl.tensor: {"__init__": _init_tensor},
    }
    with ExitStack() as stack:
        for owner, values in changes.items():
            stack.enter_context(mock.patch.multiple(owner, **values))
        yield


class _Replacements:
    """The functions of Triton's modules that a launch has replaced, to be restored and replaced again."""

    def __init__(self, scope: Any) -> None:
        before: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for owner, name, original in scope._changes:
            before.setdefault((id(owner), name), (owner, name, original))
        self._before = list(before.values())
        self._after = [(owner, name, vars(owner)[name]) for owner, name, _ in self._before]

    def apply(self) -> None:
        """Replace the functions."""
        for owner, name, value in self._after:
            setattr(owner, name, value)

    def restore(self) -> None:
        """Undo it."""
        for owner, name, original in self._before:
            if original is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _construct_once() -> Callable[..., None]:
    """Return the constructor of block types, which constructs each one once."""
    known: dict[tuple[type, str, type, tuple[int, ...]], dict[str, Any]] = {}

    def construct_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([getattr(size, "value", size) for size in shape])
        key = type(element_ty), element_ty.name, type(shape), sizes
        if key not in known:
            OWN[tl.block_type](self, element_ty, shape)
            numel, wrapped = tl.constexpr(self.numel), tl.tuple([tl.constexpr(size) for size in self.shape])
            known[key] = {**vars(self), "of_tensors": (numel, wrapped)}
        vars(self).update(known[key])
        self.element_ty = element_ty

    return construct_once


OF_SCALARS = (tl.constexpr(1), tl.tuple([]))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """Construct a tensor with the sizes that its type has wrapped."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.of_tensors if type.is_block() else OF_SCALARS


def _on_host(arguments: Sequence[Any]) -> bool:
    """Check whether no argument is elsewhere, itself or in a tuple or tensor descriptor."""
    flat = [x for value in arguments for x in (value if isinstance(value, tuple) else (value,))]
    tensors = [getattr(x, "base", x) for x in flat if hasattr(x, "data_ptr") or hasattr(x, "block_shape")]
    return all(isinstance(x, Tensor) and x.device.type == "cpu" for x in tensors)


def _erf(x: np.ndarray) -> np.ndarray:
    """Return the error function of fp32 or fp64 numbers, computed in fp64."""
    return torch.erf(torch.from_numpy(x.astype(np.float64))).numpy().astype(x.dtype)
