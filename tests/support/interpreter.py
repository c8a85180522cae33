"""Triton's interpreter, without work that takes most of its time and tests nothing of ours.

Whenever a kernel calls a device function, it looks through Triton's modules for functions to replace by its
own, though the launch of the kernel has replaced them already. And it computes each sum and product of 32-bit
integers once more in 64 bits, to check for overflow; but it fails only in debug mode, which is for the tests
of large offsets.

On a GPU, `tl.maximum` and `tl.minimum` drop NaN unless they are told to propagate it. The interpreter of
Triton 3.6 always propagates it, so that a kernel that loses NaN would pass its tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


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
def one_search_per_launch() -> Iterator[None]:
    """Replace the functions of Triton's modules when a kernel is launched, and not at every call in it."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[str]] = set()

    @cache
    def modules(fn: Callable[..., Any]) -> frozenset[str]:
        return frozenset(x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core)

    def patch_once(fn: Callable[..., Any]) -> Any:
        if modules(fn) in patched:
            return None  # of a device function, for which nothing is restored
        patched.add(modules(fn))
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()  # the end of the launch before has restored the functions
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch
