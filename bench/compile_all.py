"""Compile the kernels of a campaign in parallel, into Triton's cache, before anything is timed.

    python -m bench.compile_all --seconds 60

The kernels of each stage as it runs come first, then every candidate of the tuner; both start with fp16, in
which models compute on a GPU. Kernels that are not compiled when the time is up are compiled at their first
launch.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from multiprocessing import get_context

import torch

from bench.cases import CROPS
from catseg_fast.engine import tuner
from catseg_fast.engine.compiling import Job
from catseg_fast.engine.schedule import usual_chunk
from catseg_fast.engine.tuner import Tunable
from catseg_fast.kernels import OPS, TUNABLE_OPS, load
from catseg_fast.kernels.launch import configs
from catseg_fast.kernels.launch.capability import assume, capability_of
from catseg_fast.kernels.launch.launcher import Launch, record

CLASSES = (150, 1203)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_PROCESSES = 15
SAID_EVERY = 5.0  # seconds


def op_launches(dtype: torch.dtype, device: torch.device) -> Iterator[Launch]:
    """List the launches of each op at each of its sizes, for the usual chunk, with default configs."""
    classes, capability = usual_chunk(max(CLASSES), CROPS, device), capability_of(device)
    for op in map(load, OPS):
        for sizes in (*op.sizes.values(), *op.special.values()):
            sizes = replace(sizes, crops=CROPS, classes=classes)
            for with_options in {False, dtype == torch.float16}:
                yield from op.dry_run(sizes, dtype, "ieee", capability, with_options)[1]


def candidate_launches(dtype: torch.dtype, device: torch.device) -> Iterator[Launch]:
    """List the tuner's launches: each kernel with its present config, its default, then the others."""
    tunables = tuner.list_tunables(TUNABLE_OPS, dtype, CLASSES, CROPS, device)
    by_kernel = [_launches(tunable, device) for tunable in tunables]
    return filter(None, chain.from_iterable(zip_longest(*by_kernel)))


def _launches(tunable: Tunable, device: torch.device) -> list[Launch]:
    chosen = configs.choose(tunable.problem, device, lambda *_: tunable.candidates[0])
    with assume(capability_of(device)), record(execute=False) as launches:
        call = tunable.make_inputs(torch.device("meta"))
        launches.clear()  # of the whole op
        for config in dict.fromkeys((chosen, *tunable.candidates)):
            tunable.run(call, config)
    return launches


def all_jobs(device: torch.device) -> list[Job]:
    """Return every kernel of a campaign once, the most valuable first."""
    in_fp16, *others = DTYPES
    launches: list[Iterable[Launch]] = [op_launches(in_fp16, device), candidate_launches(in_fp16, device)]
    launches += [op_launches(dtype, device) for dtype in others]
    launches += [candidate_launches(dtype, device) for dtype in others]
    return list(dict.fromkeys(map(Job.of, chain.from_iterable(launches))))


@dataclass
class Report:
    """Result of a compilation: kernels that were compiled, that failed, and that were not reached."""

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
        seconds: time after which no other kernel is started, and none is waited for.
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
