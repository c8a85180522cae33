"""The aggregator, computed by every baseline."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import gate
from bench.baselines import Baseline, Run
from bench.cases import Call, Case, make_call
from bench.flops import call_flop
from bench.meter import Meter


def measure(group: str, meter: Meter, case: Case, baseline: Baseline) -> None:
    """Check a baseline's answer, then measure it; skip it where it cannot run."""
    device = meter.device
    if reason := baseline.unavailable(case, device):
        pytest.skip(reason)
    call = make_call(case, device)
    try:
        run = baseline.prepare(call)
        answer = run()
        ratio = gate.check(answer, *gate.expected(case, case.dtype, device))
        reference_flop, flop = call_flop(case)
        meter(
            run,
            group=group,
            case=case,
            run=baseline.name,
            dtype=case.dtype,
            remake=() if baseline.compiles else (prepare, case, baseline),
            classes=case.classes,
            error_ratio=ratio,
            reference_flop=reference_flop,
            flop=flop if baseline.ours else reference_flop,
            least_bytes=least_bytes(call, answer),
            profiled=baseline.ours and not baseline.is_graph,
            note=baseline.on_cpu if device.type == "cpu" else "",
            **({"peak_bytes": None} if baseline.is_graph else {}),
        )
    except torch.OutOfMemoryError:
        pytest.skip("does not fit the GPU's memory")


def prepare(case: Case, baseline: Baseline) -> Run:
    """Return a baseline's call on the CPU."""
    return baseline.prepare(make_call(case))


def least_bytes(call: Call, answer: Tensor) -> int:
    """Return the bytes of inputs, read once with one text for all crops, and of logits, written once."""
    return sum(x.nbytes for x in (call.img_feats, call.text_feats[:1], *call.guidance, answer))


def bench_aggregator(meter: Meter, aggregator_case: Case, baseline: Baseline) -> None:
    measure("aggregator", meter, aggregator_case, baseline)
