"""Each stage's kernels on one chunk of classes, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from bench import gate
from bench.cases import DTYPES
from bench.flops import count, phase_surplus, stage_flop
from bench.meter import Meter
from bench.stage_calls import RESOLUTION, STAGES, bind, least_bytes, make_inputs, variant_of
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.folding import cast as cast_plan
from catseg_fast.engine.schedule import usual_chunk
from catseg_fast.engine.streaming import Stages

torch_stages = cast(Stages, stages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=DTYPES.get)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("run", ["torch", "Triton"])
@torch.no_grad()
def bench_kernels(meter: Meter, full: bool, stage: str, dtype: torch.dtype, run: str) -> None:
    device = meter.device
    if device.type == "cpu" and run == "Triton":
        pytest.skip("Triton's interpreter is never timed; a GPU is needed")
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("a CPU emulates fp16")
    crops, classes = (5, usual_chunk(4096, 5, device)) if full else (1, 2)
    inputs = make_inputs(stage, crops, classes, dtype, device)
    ours = torch_stages
    if run == "Triton":
        from catseg_fast.engine.triton_stages import TritonStages  # triton exists for Linux alone

        ours = TritonStages(inputs.plan)
    bound = bind(stage, inputs)
    answer = bound(ours)
    if fallbacks := getattr(ours, "fallbacks", None):
        pytest.fail(f"runs in torch: {fallbacks}")
    exact = bind(stage, cast_plan(inputs, gate.precise(dtype)))
    ratio = gate.check(answer, bound(torch_stages), exact(torch_stages))
    flop = count(lambda: bound(torch_stages))
    if stage == "decode":
        flop -= phase_surplus(inputs.plan, crops * classes, RESOLUTION)
    meter(
        torch.no_grad()(lambda: bound(ours)),
        group="kernels",
        case=f"{stage}, t={classes}, B={crops}, {DTYPES[dtype]}",
        run=run,
        dtype=dtype,
        remake=(prepare, stage, crops, classes, dtype),
        error_ratio=ratio,
        reference_flop=stage_flop(stage.partition(",")[0], variant_of(stage), classes, crops),
        flop=flop * 1e6,
        least_bytes=least_bytes(stage, inputs, answer),
    )


def prepare(stage: str, crops: int, classes: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The stage in torch on the CPU."""
    bound = bind(stage, make_inputs(stage, crops, classes, dtype, torch.device("cpu")))
    return torch.no_grad()(lambda: bound(torch_stages))
