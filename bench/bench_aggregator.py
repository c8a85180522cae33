"""The aggregator by every baseline, and its scaling in the number of classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gate, peak_memory
from bench.baselines import Baseline
from bench.cases import Call, Case, make_call
from bench.flops import call_flop
from bench.meter import Meter


def measure(group: str, meter: Meter, case: Case, baseline: Baseline, **facts: Any) -> None:
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
        if baseline.is_graph:
            facts["peak_bytes"] = None
        meter(
            run,
            group=group,
            case=case,
            run=baseline.name,
            dtype=case.dtype,
            classes=case.classes,
            error_ratio=ratio,
            reference_flop=reference_flop,
            flop=flop if baseline.ours else reference_flop,
            least_bytes=least_bytes(call, answer),
            note=baseline.on_cpu if device.type == "cpu" else "",
            **facts,
        )
    except torch.OutOfMemoryError:
        pytest.skip("does not fit the GPU's memory")


def bench_aggregator(meter: Meter, aggregator_case: Case, baseline: Baseline) -> None:
    measure("aggregator", meter, aggregator_case, baseline)


def bench_scaling(meter: Meter, scaling_case: Case, baseline: Baseline) -> None:
    facts: dict[str, Any] = {}
    backend = {"(a)": "reference", "(d)": "torch"}.get(baseline.name[:3])
    if meter.device.type == "cpu":
        if backend is None:
            pytest.skip("on a CPU, (a) and (d) alone scale")
        request = {"variant": scaling_case.variant, "classes": scaling_case.classes}
        child = peak_memory.measure(**request, crops=scaling_case.crops, run=backend)
        facts["peak_bytes"] = int(child["peak_bytes"])
    measure("scaling", meter, scaling_case, baseline, **facts)


def least_bytes(call: Call, answer: Tensor) -> int:
    """Inputs read once, with one text for all crops, and logits written once."""
    return sum(x.nbytes for x in (call.img_feats, call.text_feats[:1], *call.guidance, answer))
