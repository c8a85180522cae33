"""The one place where kernels are launched.

Every `launch` function of this library calls `run`. Inside `record`, the launches of the calling thread are
listed; without `execute` they are only listed, so that the tensors can be on the meta device. The
ahead-of-time gate compiles the listed launches, and therefore exactly what a launch passes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from catseg_fast.kernels.launch.config import LaunchConfig


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs along each axis.
        arguments: the runtime arguments by name, in order: tensors, tensor descriptors, numbers or None.
        constants: the `tl.constexpr` arguments by name.
        options: Triton's options by name.
        compiled: Triton's compiled kernel; None in the interpreter, and if nothing was executed.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    compiled: Any = None

    def without_arguments(self) -> Launch:
        """Return the launch without its tensors, so that it does not keep them alive."""
        return replace(self, arguments={})


class _Recorder(threading.local):
    launches: list[Any] | None = None
    execute = True
    note: Callable[[Launch], Any] | None = None


_recorder = _Recorder()


@contextmanager
def record(execute: bool = True, note: Callable[[Launch], Any] | None = None) -> Iterator[list[Any]]:
    """List the launches of this thread.

    Args:
        execute: whether they run.
        note: maps each launch, when it has run, to what is listed; by default the `Launch` itself.
    """
    launches: list[Any] = []
    before = _recorder.launches, _recorder.execute, _recorder.note
    _recorder.launches, _recorder.execute, _recorder.note = launches, execute, note
    try:
        yield launches
    finally:
        _recorder.launches, _recorder.execute, _recorder.note = before


def recording() -> bool:
    """Check whether launches of this thread are listed."""
    return _recorder.launches is not None


def listing() -> bool:
    """Check whether launches of this thread are only listed."""
    return _recorder.launches is not None and not _recorder.execute


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: LaunchConfig, **constants: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs along each axis.
        *arguments: the runtime arguments, in the order of the signature.
        config: has Triton's options, `num_warps`, `num_stages` and possibly `maxnreg`. The caller passes its
            other fields as constants.
        **constants: the `tl.constexpr` arguments.
    """
    options = config.options
    if _recorder.launches is None:
        kernel[grid](*arguments, **constants, **options)
    else:
        compiled = None
        if _recorder.execute:
            with _disable_current_modes():  # the interpreter computes with PyTorch's own operations
                compiled = kernel[grid](*arguments, **constants, **options)
        names = [name for name in kernel.arg_names if name not in constants]
        named = dict(zip(names, arguments, strict=True))
        launch = Launch(kernel, grid, named, constants, options, compiled)
        _recorder.launches.append(launch if _recorder.note is None else _recorder.note(launch))
