"""Seconds to compile what a first call launches, into an empty Triton cache; on any machine, without a GPU.

    python -m bench.cold_start --threads 2

Printed as JSON: the number of kernels of the call and of the check before it, seconds to list and to compile
them, and seconds of CPU time, which are more informative on a busy machine. It needs a process of its own, in
which Triton's interpreter is off.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence

import torch

from bench.fake_gpu import fake_gpu, make_call
from catseg_fast.config import VARIANTS
from catseg_fast.engine import fourier
from catseg_fast.engine.compiling import Job, compile_jobs
from catseg_fast.engine.self_check import random_plan, run_stream
from catseg_fast.engine.terms import image_terms
from catseg_fast.engine.triton_stages import TritonStages
from catseg_fast.kernels.launch.launcher import record


@torch.no_grad()
def first_call(variant: str, classes: int, crops: int, limit: int | None) -> tuple[list[Job], list[Job]]:
    """List the kernels of a published aggregator's first call and of the check before it, in fp16."""
    with fake_gpu():
        call = make_call(variant, classes, crops, limit)
        with record(execute=False, note=Job.of) as called:
            call()
        engine = call.aggregator.engine  # type: ignore[attr-defined]
        plan = engine.plan(torch.float16)
        image = image_terms(engine.aggregator, plan, call.img_feats, call.guidance)  # type: ignore[attr-defined]
        direct = not fourier.pays_off(plan, crops * min(classes, limit or classes))
        with record(execute=False, note=Job.of) as checked:
            run_stream(TritonStages(random_plan(plan)), plan, image, direct)
    return called, checked


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished child processes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="v2-vitl")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--crops", type=int, default=5)
    parser.add_argument("--best", type=int, help="aggregate only the best classes of each crop")
    parser.add_argument("--threads", type=int, help="by default as many as there are cores")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels do not compile")
    start = time.perf_counter()
    called, checked = first_call(options.variant, options.classes, options.crops, options.best)
    listed = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        start, before = time.perf_counter(), cpu_seconds()
        failed = compile_jobs([*called, *checked], torch.device("meta"), options.threads)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    found = {
        "kernels of the call": len(set(called)),
        "further kernels of the check": len(set(checked) - set(called)),
        "do not compile": sorted(failed.values()),
        "seconds to list": round(listed, 2),
        "seconds to compile": round(seconds, 2),
        "CPU seconds to compile": round(cpu, 2),
        "threads": options.threads or len(os.sched_getaffinity(0)),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
