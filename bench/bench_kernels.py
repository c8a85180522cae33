"""Each op's kernels on one chunk of classes, against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import gate
from bench.cases import DTYPES
from bench.flops import count, phase_surplus, stage_flop
from bench.meter import Meter
from bench.stage_calls import RESOLUTION, STAGES, make_stage_call, variant_of
from catseg_fast.engine.schedule import usual_chunk


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
    call = make_stage_call(stage, crops, classes, dtype, device)
    ours = call.triton if run == "Triton" else call.plain
    answer = ours()
    ratio = gate.check(answer, call.plain(), call.to(gate.precise(dtype)).plain())
    flop = count(call.plain)
    if stage == "decode":
        phases = [weight for weight in call.inputs["weights"] if weight.shape[1:3] == (2, 2)]
        flop -= phase_surplus(phases, crops * classes, RESOLUTION)
    meter(
        torch.no_grad()(ours),
        group="kernels",
        case=f"{stage}, t={classes}, B={crops}, {DTYPES[dtype]}",
        run=run,
        dtype=dtype,
        remake=(prepare, stage, crops, classes, dtype),
        error_ratio=ratio,
        reference_flop=stage_flop(stage.partition(",")[0], variant_of(stage), classes, crops),
        flop=flop * 1e6,
        least_bytes=call.least_bytes(answer),
    )


def prepare(stage: str, crops: int, classes: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return the stage in torch on the CPU."""
    return torch.no_grad()(make_stage_call(stage, crops, classes, dtype, torch.device("cpu")).plain)
