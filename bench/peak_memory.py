"""Peak memory of a call on a CPU above weights and inputs, measured in a process of its own.

One process measures all calls of a run, one after the other. Memory that a call frees goes back to the system
at once, so that the next call cannot use it unnoticed.
"""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.measure import THREADS

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Blocks above 64 KiB are the system's, in libc and MKL.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}


@dataclass(frozen=True)
class Peak:
    """Time and memory of one call."""

    bytes: int
    seconds: float


def measure(make: Callable[..., Callable[[], Any]], *arguments: Any, warm_up: bool = True) -> Peak | None:
    """Return the peak memory of a call of `make(*arguments)`; None if the system does not report it.

    Args:
        make: a function of a module that the other process imports.
        *arguments: arguments that can be pickled.
        warm_up: whether to make another call before, so that what libraries keep from their first call
            on, tens of MiB, does not count.
    """
    return _process().submit(_run, make, arguments, warm_up).result() if CLEAR.exists() else None


@functools.cache
def _process() -> ProcessPoolExecutor:
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update(ALLOCATOR)
    try:
        process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        process.submit(int).result()  # starts it
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return process


def _run(make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], warm_up: bool) -> Peak:
    torch.set_num_threads(THREADS)
    call = make(*arguments)
    if warm_up:
        call()
    gc.collect()
    CLEAR.write_text("5")  # the high-water mark starts here
    before, start = _memory("VmRSS"), time.perf_counter()
    call()
    return Peak(_memory("VmHWM") - before, time.perf_counter() - start)


def _memory(field: str) -> int:
    """Return a field of this process's status in bytes: VmRSS is its memory, VmHWM the most it had."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
