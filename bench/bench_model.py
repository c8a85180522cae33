"""The whole model on one picture, and how its time splits."""

from __future__ import annotations

import pytest
import torch

from bench.baselines import graphed
from bench.cases import BENCHED_VARIANTS
from bench.meter import Meter
from bench.model_parts import GRAPH, PARTS, SIZE, checked_model, make_parts


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", BENCHED_VARIANTS)  # varies slowest
@torch.no_grad()
def bench_model(meter: Meter, full: bool, variant: str, part: str) -> None:
    device = meter.device
    if part == GRAPH and device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    if not full and variant != "v2-vitb":
        pytest.skip("takes minutes: runs with --full")
    classes, dtype = (150, torch.float16) if device.type == "cuda" else (4, torch.float32)
    model = checked_model(variant, classes, device, dtype)
    run, facts = torch.no_grad()(make_parts(model.model, model.picture)[part]), {}
    if part == GRAPH:
        run, facts["peak_bytes"] = graphed(run), None  # which was taken before
    run()
    meter(
        run,
        group="model",
        case=f"{variant}, T={classes}, {SIZE[0]}x{SIZE[1]}, B={len(model.picture.images)}",
        run=part,
        dtype=dtype,
        error_ratio=model.error_ratio,
        **facts,
    )
