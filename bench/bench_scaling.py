"""The aggregator with more and more classes, all aggregated."""

from __future__ import annotations

import pytest
import torch

from bench.baselines import Baseline
from bench.bench_aggregator import measure
from bench.cases import Case
from bench.meter import Meter


def bench_scaling(meter: Meter, scaling_case: Case, baseline: Baseline) -> None:
    in_fp32 = scaling_case.dtype == torch.float32
    if in_fp32 and meter.device.type == "cuda" and not baseline.name.startswith("(a)"):
        pytest.skip("on a GPU, what is held against (a) runs in bf16")
    measure("scaling", meter, scaling_case, baseline)
