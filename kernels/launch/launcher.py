"""The one place where kernels are launched.

Every `launch` function of this library ends in `run`. Inside `record` the launches of the calling thread are
listed; without `execute` they are only listed, so that tensors on the meta device do. The ahead-of-time gate
compiles what is listed, and therefore exactly what a launch passes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from catseg_fast.kernels.launch.config import LaunchConfig


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs along each axis.
        arguments: its runtime arguments by name, in order: tensors, tensor descriptors, numbers or None.
        constants: its `tl.constexpr` arguments by name.
        options: Triton's options by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]


class _Recorder(threading.local):
    launches: list[Launch] | None = None
    execute = True


_recorder = _Recorder()


@contextmanager
def record(execute: bool = True) -> Iterator[list[Launch]]:
    """List the launches of this thread; without `execute`, nothing runs."""
    launches: list[Launch] = []
    before = _recorder.launches, _recorder.execute
    _recorder.launches, _recorder.execute = launches, execute
    try:
        yield launches
    finally:
        _recorder.launches, _recorder.execute = before


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: LaunchConfig, **constants: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs along each axis.
        *arguments: its runtime arguments, in the order of its signature.
        config: gives `num_warps`, `num_stages` and, if it has the field, `maxnreg`; what else it holds is
            passed as constants by the caller.
        **constants: its `tl.constexpr` arguments.
    """
    options = config.options
    if _recorder.launches is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        named = dict(zip(names, arguments, strict=True))
        _recorder.launches.append(Launch(kernel, grid, named, constants, options))
    if _recorder.execute:
        kernel[grid](*arguments, **constants, **options)
