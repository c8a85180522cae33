"""One stage's kernels for a profiler: `ncu … python -m bench.run_stage "decode, t=51, B=5, bf16"`.

The case is named as in the records of `bench_kernels.py`. Only the last of a few calls is profiled.
"""

from __future__ import annotations

import argparse
import re

import torch

from bench.cases import DTYPES
from bench.stage_calls import STAGES, bind, make_inputs
from catseg_fast.triton_stages import TritonStages

WARM_UP = 3


def parse(case: str) -> tuple[str, int, int, torch.dtype]:
    """Stage, crops, classes and type of a case.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"(.+), t=(\d+), B=(\d+), (\w+)", case)
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    if match is None or match[1] not in STAGES or match[4] not in dtypes:
        raise ValueError(f"case: {case!r} is no benchmark of kernels")
    return match[1], int(match[3]), int(match[2]), dtypes[match[4]]


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    stage, crops, classes, dtype = parse(parser.parse_args().case)
    inputs = make_inputs(stage, crops, classes, dtype, torch.device("cuda"))
    call, stages = bind(stage, inputs), TritonStages(inputs.plan)
    with torch.no_grad():
        for _ in range(WARM_UP):
            call(stages)
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            call(stages)
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
