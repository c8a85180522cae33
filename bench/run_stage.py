"""One stage for a profiler: `ncu … python -m bench.run_stage "decode, t=51, B=5, bf16"`.

The case is named as in the records of `bench_kernels.py`. Only the last of a few calls is profiled: on a GPU
by a profiler that runs this, or, with `--torch`, by PyTorch's, whose table is printed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import DTYPES
from bench.stage_calls import STAGES, make_stage_call

WARM_UP = 3
ROWS = 25


def parse(case: str) -> tuple[str, int, int, torch.dtype]:
    """Return stage, crops, classes and type of a case.

    Raises:
        ValueError: if it is not a case.
    """
    match = re.fullmatch(r"(.+), t=(\d+), B=(\d+), (\w+)", case)
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    if match is None or match[1] not in STAGES or match[4] not in dtypes:
        raise ValueError(f"case: {case!r} is no benchmark of kernels")
    return match[1], int(match[3]), int(match[2]), dtypes[match[4]]


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the stage in torch")
    parser.add_argument("--torch", action="store_true", help="print PyTorch's own profile")
    options = parser.parse_args()
    stage, crops, classes, dtype = parse(options.case)
    made = make_stage_call(stage, crops, classes, dtype, torch.device(options.device))
    call = made.triton if options.device == "cuda" else made.plain
    with torch.no_grad():
        for _ in range(WARM_UP):
            call()
        if options.torch:
            _print_profile(call, options.device)
            return
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            call()
            torch.cuda.synchronize()


def _print_profile(call: Callable[[], object], device: str) -> None:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, record_shapes=True) as found:
        call()
    order = f"self_{device}_time_total"
    print(found.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=ROWS))


if __name__ == "__main__":
    main()
