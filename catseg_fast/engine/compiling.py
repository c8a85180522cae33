"""Compilation of several kernels in parallel, without a launch.

Triton's cache folder keeps the compiled kernels, and they are loaded in this process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels.launch.launcher import Launch

MOST_THREADS = 16  # each compiles a kernel, in some hundred megabytes


@dataclass(frozen=True)
class Job:
    """A kernel to compile for certain arguments; hashable, and can be sent to another process.

    Attributes:
        module, name: module and name of the `@triton.jit` function.
        arguments: properties of the arguments that matter for compilation, in order.
        options: `tl.constexpr` arguments and Triton's options, by name.
    """

    module: str
    name: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, launch: Launch) -> Job:
        """Return the job that compiles a launch; it keeps none of the tensors."""
        options = (*launch.constants.items(), *launch.options.items())
        function = launch.kernel.fn
        told = tuple(map(_told, launch.arguments.values()))
        return cls(function.__module__, function.__name__, told, options)

    @property
    def kernel(self) -> Any:
        """The `@triton.jit` function."""
        return getattr(importlib.import_module(self.module), self.name)

    def compile(self) -> str | None:
        """Compile the kernel for the current GPU; return why it does not compile, or None."""
        try:
            arguments = (x.make() if isinstance(x, _Descriptor) else x for x in self.arguments)
            self.kernel.warmup(*arguments, grid=(1,), **dict(self.options))
        except Exception as error:  # any error of the compiler is a result
            cause = error.__cause__ or error
            return f"{type(cause).__name__}: {str(cause).strip()[-300:]}"
        return None


@dataclass(frozen=True)
class _Unaligned:
    """A pointer that is not a multiple of 16, for Triton."""

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return 1

    def ptr_range(self) -> int:
        return 0


@dataclass(frozen=True)
class _Descriptor:
    """A tensor descriptor without its tensor; only the type of the tensor is kept."""

    kind: type
    values: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, descriptor: Any) -> _Descriptor:
        """Return the description of a descriptor, which is a dataclass."""
        values = {field.name: getattr(descriptor, field.name) for field in fields(descriptor)}
        told = {name: x.dtype if isinstance(x, Tensor) else _frozen(x) for name, x in values.items()}
        return cls(type(descriptor), tuple(told.items()))

    def make(self) -> Any:
        """Return a descriptor of the same kind for a tensor on the meta device."""
        values: dict[str, Any] = {name: list(x) if isinstance(x, tuple) else x for name, x in self.values}
        base = torch.empty_strided(values["shape"], values["strides"], dtype=values["base"], device="meta")
        return self.kind(**{**values, "base": base})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _told(value: Any) -> Any:
    """Return the properties that Triton specialises on: a tensor's type and alignment, a number's kind."""
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else _Unaligned(value.dtype)
    if hasattr(value, "block_shape"):
        return _Descriptor.of(value)
    if type(value) is not int or value == 1:
        return value
    return (2**32 if value >= 2**31 else 0) + (16 if value % 16 == 0 else 7)


def compile_jobs(
    jobs: Sequence[Job],
    device: torch.device,
    threads: int | None = None,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> dict[Job, str]:
    """Compile kernels for a GPU in parallel.

    Threads suffice: Triton's compiler spends nine tenths of its time outside Python.

    Args:
        jobs: the kernels; those that this process has compiled before take no time.
        device: the GPU.
        threads: how many compile at a time; by default as many as this process has cores.
        advance: called with the number of kernels done and the total.

    Returns:
        Reasons of the kernels that do not compile.
    """
    different = list(dict.fromkeys(jobs))
    threads = threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))

    def work(job: Job) -> str | None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return job.compile()

    failed = {}
    with ThreadPoolExecutor(threads) as pool:
        running = {pool.submit(work, job): job for job in different}
        for done, future in enumerate(as_completed(running), 1):
            if (reason := future.result()) is not None:
                failed[running[future]] = reason
            advance(done, len(different))
    return failed
