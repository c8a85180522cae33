"""The engine on two threads of a CPU: speeds that BENCHMARKS.md quotes, and peak memory of long calls.

    pytest bench/bench_engine.py --benchmark-only --full

Without `--full` the cases that take minutes are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import peak_memory
from bench.baselines import BASELINES, Baseline
from bench.bench_aggregator import measure, prepare
from bench.cases import CROPS, Case, make_call
from bench.flops import flop_table
from bench.measure import Timing
from bench.meter import Meter
from catseg_fast import SlidingWindow
from catseg_fast.inference.readout import LabelMap, Readout, reader

REFERENCE, ENGINE = (next(b for b in BASELINES if b.name.startswith(letter)) for letter in ("(a)", "(d)"))
LARGE = (1024, 2048)

full = pytest.mark.full
only_on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")


@only_on_a_cpu
@pytest.mark.parametrize("run", [REFERENCE, ENGINE], ids=["reference", "engine"])
@pytest.mark.parametrize(
    "case",
    [
        Case("v2-vitl", 20),
        pytest.param(Case("v2-vitl", 150), marks=full),
        pytest.param(Case("v2-vitl", 150, dtype=torch.bfloat16), marks=full),
        pytest.param(Case("v1-vitl-swinb", 150), marks=full),
    ],
    ids=str,
)
def bench_engine_cpu_speed(meter: Meter, case: Case, run: Baseline) -> None:
    measure("engine on a CPU", meter, case, run)


@only_on_a_cpu
@full
@pytest.mark.parametrize("run", [REFERENCE, ENGINE], ids=["reference", "engine"])
def bench_engine_cpu_memory(meter: Meter, run: Baseline) -> None:
    case = Case("v1-vitl-swinb", 150, CROPS)
    _measure_memory(meter, str(case), run.name, prepare, case, run)


@only_on_a_cpu
@full
@pytest.mark.parametrize("classes", [300, 1200])
def bench_engine_cpu_memory_of_a_large_vocabulary(meter: Meter, classes: int) -> None:
    case = Case("v1-vitl-swinb", classes, CROPS)
    _measure_memory(meter, f"{case}, {LARGE[0]}x{LARGE[1]}", "label map, recompute", prepare_label_map, case)


def _measure_memory(
    meter: Meter, case: str, run: str, make: Callable[..., Callable[[], Any]], *arguments: Any
) -> None:
    """Measure the peak memory of a call of minutes, which is made once; smaller cases check its result."""
    peak = meter.benchmark.pedantic(lambda: peak_memory.measure(make, *arguments, warm_up=False), rounds=1)
    if peak is None:
        pytest.skip("the system does not tell a process's peak memory")
    meter.record(
        Timing.of([peak.seconds]),
        group="memory on a CPU",
        case=case,
        run=run,
        dtype=torch.float32,
        peak_bytes=peak.bytes,
        note="one call, with an allocator for measuring memory: no time to compare",
    )


def prepare_label_map(case: Case) -> Callable[[], Any]:
    """Return the call of the engine that keeps nothing, read out into a label map of `LARGE`."""
    call = make_call(case)
    engine = call.aggregator.engine
    engine.policy = "recompute"
    readout, target = Readout(LARGE, SlidingWindow()), LabelMap(LARGE, torch.device("cpu"))

    def run() -> None:
        vocabulary = engine.vocabulary(call.text_feats, None)
        engine.stream(
            call.img_feats, vocabulary, call.guidance, None,
            lambda: reader(readout, target),
        )  # fmt: skip

    return torch.no_grad()(run)


@only_on_a_cpu
@full
@pytest.mark.parametrize("run", [REFERENCE, ENGINE], ids=["reference", "engine"])
def bench_engine_cpu_training_memory(meter: Meter, run: Baseline) -> None:
    case = Case("v2-vitl", 171)
    _measure_memory(
        meter, f"{case}, training step, pooling 2x2", run.name, prepare_training_step, case, run.name
    )


def prepare_training_step(case: Case, run: str) -> Callable[[], Any]:
    """Return a forward and backward pass with upstream's pooling; the engine recomputes each chunk."""
    call = make_call(case)
    aggregator: Any = call.aggregator
    for layer in aggregator.layers:
        layer.attention.pool = torch.nn.AvgPool2d(2)
    aggregator.backend = "reference" if run == REFERENCE.name else "torch"
    aggregator.engine.checkpoint = True
    return lambda: aggregator(call.img_feats, call.text_feats, call.guidance).square().mean().backward()


@only_on_a_cpu
@pytest.mark.parametrize("case", [Case("v2-vitl", 20), Case("v1-vitl-swinb", 33)], ids=str)
def bench_engine_cpu_flops(
    benchmark: BenchmarkFixture, table: Callable[[str, dict[str, Any]], None], case: Case
) -> None:
    """Print a table of operations; nothing is timed."""
    for stage, reference, ours in benchmark.pedantic(lambda: flop_table(case), rounds=1):
        table(
            f"MFLOP for each class and crop, counted: {case}",
            {
                "stage": stage,
                "reference": f"{reference:.1f}",
                "engine": f"{ours:.1f}",
                "saved": f"{1 - ours / reference:.0%}",
            },
        )
