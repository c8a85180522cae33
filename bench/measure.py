"""Times, peak memory, and the best rates of the device, all in the same run."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from catseg_fast.environment import ptxas

# Of the CPU benchmarks; the figures in the documentation are for two.
THREADS = min(2, torch.get_num_threads())
GPU_ROUNDS = CPU_ROUNDS = (3, 30)  # least and most
SECONDS = 1.0  # for all rounds of a call that is short enough
CEILING_ROUNDS = 10


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Return the median and percentiles; of one call, all are the same."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), p20, p80, len(seconds))


def time_call(call: Callable[[], Any], device: torch.device, rounds: int | None = None) -> Timing:
    """Time a call that has been made before: CUDA events on a GPU, the clock elsewhere.

    Without `rounds`, there are as many as fit into a second, within limits.
    """
    rounds = rounds or rounds_of(clock(call, device), device)
    if device.type != "cuda":
        return Timing.of([clock(call, device) for _ in range(rounds)])
    marks = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        marks.append((start, stop))
    torch.cuda.synchronize(device)
    return Timing.of([start.elapsed_time(stop) / 1e3 for start, stop in marks])


def rounds_of(seconds: float, device: torch.device) -> int:
    """Return how often a call of some duration is timed."""
    least, most = GPU_ROUNDS if device.type == "cuda" else CPU_ROUNDS
    return max(least, min(most, int(SECONDS / seconds)))


def clock(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, until the device is done."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that a call allocates on a GPU; for a CPU there is `bench.peak_memory`."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product in `dtype`, of the fastest size; fp32 without TF32."""
    rates = []
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        rates.append(
            2 * size**3 / time_call(functools.partial(torch.matmul, a, b), device, CEILING_ROUNDS).median
        )
    return max(rates)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes/s, read and written, of a copy that no cache holds."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    return 2 * size / time_call(lambda: target.copy_(source), device, CEILING_ROUNDS).median


def device_name(device: torch.device) -> str:
    """Return the name of a device, for tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = open_lines("/proc/cpuinfo")
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU {model or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def versions() -> dict[str, str]:
    """Return the versions that times depend on."""
    found = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["ptxas"] = ptxas(10 * major + minor)
    return found


def open_lines(path: str) -> list[str]:
    """Return the lines of a file; none if it does not exist."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:
        return []
