"""Savings of each step from the reference to the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import ablation, gate
from bench.bench_aggregator import least_bytes
from bench.cases import CROPS, Case, make_call
from bench.flops import call_flop, count
from bench.meter import Meter


@pytest.mark.parametrize("step", ablation.STEPS)
def bench_ablation(meter: Meter, full: bool, step: str) -> None:
    """Measure all steps in one type: fp32 on a CPU, bf16 on a GPU."""
    device = meter.device
    if "kernel" in step and device.type == "cpu":
        pytest.skip("Triton's interpreter is never timed; a GPU is needed")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = Case("v2-vitl", 150, CROPS, dtype) if full else Case("v2-vitl", 4)
    call = make_call(case, device).to(dtype)
    run = ablation.prepare(call, step)
    answer = run()
    reference_flop, flop = call_flop(case)
    if "kernel" not in step and "streaming" not in step:
        flop = 1e6 * count(run)
    meter(
        run,
        group="ablation",
        case=case,
        run=step,
        dtype=dtype,
        remake=(prepare, case, step),
        error_ratio=gate.check(answer, *gate.expected(case, dtype, device)),
        reference_flop=reference_flop,
        flop=flop,
        least_bytes=least_bytes(call, answer),
    )


def prepare(case: Case, step: str) -> Callable[[], Tensor]:
    """Return the step's call on the CPU."""
    return ablation.prepare(make_call(case).to(case.dtype), step)
