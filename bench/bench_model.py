"""The whole model on one picture, against the reference, and how its time splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.baselines import graphed
from bench.cases import BENCHED_VARIANTS, DTYPES, Case
from bench.flops import call_flop, count
from bench.meter import Meter
from bench.model_parts import GRAPH, REFERENCE, SIZE, SPLIT, WHOLE, checked_model, make_model, make_parts


@pytest.mark.parametrize("part", [*WHOLE, *SPLIT])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("variant", BENCHED_VARIANTS)  # varies slowest
@torch.no_grad()
def bench_model(meter: Meter, full: bool, variant: str, dtype: torch.dtype, part: str) -> None:
    device = meter.device
    if part == GRAPH and device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    if part == REFERENCE and dtype != torch.float32:
        pytest.skip("the reference is that in fp32")
    if not full and (variant != "v2-vitb" or dtype != torch.float32):
        pytest.skip("takes minutes: runs with --full")
    classes = 150 if device.type == "cuda" else 4
    model = checked_model(variant, classes, device, dtype)
    parts, crops = make_parts(model.model, model.picture), len(model.picture.images)
    run, facts = torch.no_grad()(parts[part]), dict[str, Any]()
    if part == GRAPH:
        run, facts["peak_bytes"] = graphed(run), None  # which was taken before
    run()
    if part != "post-processing":  # has no products
        reference_flop, flop = call_flop(Case(variant, classes, crops, dtype))
        encoders = {name: 1e6 * count(parts[name]) for name in ("CLIP", "guidance")}
        if part in WHOLE:
            reference_flop, flop = (x + sum(encoders.values()) for x in (reference_flop, flop))
        elif part in encoders:
            reference_flop = flop = encoders[part]
        facts |= {"reference_flop": reference_flop, "flop": reference_flop if part == REFERENCE else flop}
    meter(
        run,
        group="model" if part in WHOLE else "model split",
        case=f"{variant}, T={classes}, {SIZE[0]}x{SIZE[1]}, B={crops}, {DTYPES[dtype]}",
        run=part,
        dtype=dtype,
        remake=(prepare, variant, classes, dtype, part) if part in WHOLE else (),
        error_ratio=model.error_ratio,
        profiled=part == "engine",
        **facts,
    )


@torch.no_grad()
def prepare(variant: str, classes: int, dtype: torch.dtype, part: str) -> Callable[[], Any]:
    """Return a part of the model on the CPU."""
    return torch.no_grad()(make_parts(*make_model(variant, classes, torch.device("cpu"), dtype))[part])
