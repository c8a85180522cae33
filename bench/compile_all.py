"""Compile the kernels of a campaign side by side, before anything is timed: they are in Triton's cache then.

    python -m bench.compile_all --seconds 60

Listed are the kernels of each stage as it runs, then every candidate of the tuner; first in fp16, which is
what models compute in on a GPU. What is not compiled when the time is up is compiled on the way, one by one.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import CROPS
from bench.model_parts import SIZE
from bench.stage_calls import STAGES, StageInputs, bind, make_inputs
from catseg_fast import SlidingWindow
from catseg_fast.engine import tuner
from catseg_fast.engine.schedule import usual_chunk
from catseg_fast.engine.streaming import Stages
from catseg_fast.inference.readout import LabelMap, Readout, reader
from catseg_fast.kernels import TUNABLE_OPS
from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.tunable import Tunable

CLASSES = (150, 1203)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_PROCESSES = 15
SAID_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Job:
    """A kernel to compile for certain arguments; can be sent to another process.

    Attributes:
        module, name: of the `@triton.jit` function.
        arguments: in order; a tensor is told by its type, and is aligned as PyTorch's are.
        options: `tl.constexpr` arguments and Triton's options, by name.
    """

    module: str
    name: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Job:
        """The job that compiles a launch."""
        told = tuple(x.dtype if isinstance(x, Tensor) else x for x in arguments)
        return cls(kernel.fn.__module__, kernel.fn.__name__, told, tuple(options.items()))

    def compile(self) -> str | None:
        """Compile the kernel for the current GPU; why it does not compile, if so."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        try:
            kernel.warmup(*self.arguments, grid=(1,), **dict(self.options))
        except Exception as error:  # whatever the compiler says is the result
            cause = error.__cause__ or error
            return f"{type(cause).__name__}: {str(cause).strip()[-300:]}"
        return None


@contextmanager
def listing() -> Iterator[list[Job]]:
    """List the launches of Triton kernels in place of making them."""
    from triton.runtime.jit import JITFunction

    jobs: list[Job] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        jobs.append(Job.of(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", run):
        yield jobs


def jobs_of(calls: Iterable[Callable[[], object]]) -> list[Job]:
    """What calls would compile, each once and in their order."""
    found: dict[Job, None] = {}
    for call in calls:
        with listing() as jobs, torch.no_grad():
            call()
        found |= dict.fromkeys(jobs)
    return list(found)


def stage_calls(dtype: torch.dtype, device: torch.device) -> Iterator[Callable[[], object]]:
    """Each stage on the chunk that most calls have."""
    from catseg_fast.engine.triton_stages import TritonStages  # triton exists only for Linux

    classes = usual_chunk(max(CLASSES), CROPS, device)
    for stage in STAGES:
        inputs = make_inputs(stage, CROPS, classes, dtype, device)
        yield partial(_run_stage, stage, inputs, TritonStages(inputs.plan))
    logits = torch.zeros(CROPS, classes, 96, 96, dtype=dtype, device=device)
    readout, target = Readout(SIZE, SlidingWindow()), LabelMap(SIZE, device)
    yield lambda: reader(readout, target, "triton")(slice(0, classes), logits)


def _run_stage(stage: str, inputs: StageInputs, stages: Stages) -> None:
    bind(stage, inputs)(stages)


def candidate_calls(dtype: torch.dtype, device: torch.device) -> Iterator[Callable[[], object]]:
    """Each candidate of the tuner, the default of each kernel first."""
    tunables = tuner.list_tunables(tuple(TUNABLE_OPS), dtype, CLASSES, CROPS, device)
    for place in range(max(len(tunable.candidates) for tunable in tunables)):
        for tunable in tunables:
            if place < len(tunable.candidates):
                yield partial(_run_candidate, tunable, tunable.candidates[place])


def _run_candidate(tunable: Tunable, config: LaunchConfig) -> None:
    tunable.run(tunable.make_inputs(torch.device("meta")), config)


def all_jobs(device: torch.device) -> list[Job]:
    """Every kernel of a campaign, in the order of their value."""
    in_fp16, *others = DTYPES
    calls = [*stage_calls(in_fp16, device), *candidate_calls(in_fp16, device)]
    calls += [call for dtype in others for call in stage_calls(dtype, device)]
    calls += [call for dtype in others for call in candidate_calls(dtype, device)]
    return jobs_of(calls)


@dataclass
class Report:
    """How many kernels were compiled, why some were not, and how many there was no time for."""

    compiled: int
    failed: dict[Job, str]
    left: int


def compile_all(
    jobs: Sequence[Job],
    processes: int,
    seconds: float = math.inf,
    start: Callable[[], None] | None = None,
) -> Report:
    """Compile jobs in processes of their own, in order, until the time is up.

    Args:
        jobs: the kernels.
        processes: how many.
        seconds: after which no other kernel is begun, and none is waited for.
        start: called in each process before its first job.
    """
    begun = said = time.monotonic()
    report, waiting = Report(0, {}, 0), iter(jobs)
    running: dict[Future[str | None], Job] = {}
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=start)
    try:
        while (left := seconds - (time.monotonic() - begun)) > 0:
            for job in waiting:
                running[pool.submit(job.compile)] = job
                if len(running) > 2 * processes:
                    break
            if not running:
                break
            done, _ = wait(running, timeout=min(left, SAID_EVERY), return_when=FIRST_COMPLETED)
            for future in done:
                job, reason = running.pop(future), future.result()
                report.compiled += reason is None
                if reason is not None:
                    report.failed[job] = reason
            if time.monotonic() - said > SAID_EVERY:
                said = time.monotonic()
                print(f"{report.compiled + len(report.failed)} of {len(jobs)} kernels", flush=True)
    finally:
        report.left = len(jobs) - report.compiled - len(report.failed)
        for process in list((pool._processes or {}).values()) if report.left else ():
            process.kill()  # a kernel that compiles for minutes holds nothing up
        pool.shutdown(wait=not report.left, cancel_futures=True)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--processes", type=int, help="by default one less than the machine has cores")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA GPU to compile for; found none, with torch {torch.__version__}")
    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    processes = options.processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 1))
    jobs = all_jobs(device)
    print(
        f"{len(jobs)} kernels, listed in {time.monotonic() - start:.0f} s; {processes} processes", flush=True
    )
    report = compile_all(jobs, processes, options.seconds - (time.monotonic() - start))
    for job, reason in report.failed.items():
        print(f"{job.name} {dict(job.options)}: {reason}")
    print(
        f"{report.compiled} compiled, {len(report.failed)} do not compile, {report.left} not reached, "
        f"in {time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
