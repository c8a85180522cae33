"""The engine on the CPU against the eager reference, in the same process with the same threads.

    pytest bench/bench_engine.py --benchmark-only --full

Without `--full` the cases that take minutes are left out. A speed is printed only for a case whose answer
was checked in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case, make_call
from bench.flops import flop_table
from bench.peak_memory import measure

Table = Callable[[str, dict[str, Any]], None]

# Case, type of the engine's stages, speed-up to reach.
SPEED = [
    (Case("v2-vitl", 20), torch.float32, 12.0),
    pytest.param(Case("v2-vitl", 150), torch.float32, 2.5, marks=pytest.mark.full),
    pytest.param(Case("v1-vitl-swinb", 150), torch.float32, 2.0, marks=pytest.mark.full),
    pytest.param(Case("v2-vitl", 150), torch.bfloat16, 4.0, marks=pytest.mark.full),
]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}  # largest error over largest logit

_reference: dict[Case, tuple[float, torch.Tensor]] = {}


def reference_run(case: Case) -> tuple[float, torch.Tensor]:
    """Seconds (the better of two runs) and logits of the reference; run once a case."""
    if case not in _reference:
        call = make_call(case)
        call.aggregator.backend = "reference"
        logits, seconds = call(), []
        for _ in range(2):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        _reference[case] = (min(seconds), logits)
    return _reference[case]


@pytest.mark.parametrize(("case", "dtype", "goal"), SPEED, ids=lambda value: str(value))
def bench_engine_cpu_speed(
    benchmark: BenchmarkFixture, table: Table, case: Case, dtype: torch.dtype, goal: float
) -> None:
    seconds, expected = reference_run(case)
    call = make_call(case)
    call.aggregator.backend = "torch"
    call.aggregator.engine.precision = dtype
    error = ((call().float() - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE[dtype], f"no speed for a wrong answer: relative error {error:.1e}"
    benchmark.group = "engine, CPU"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    stats = benchmark.stats.stats
    benchmark.extra_info.update(reference_seconds=seconds, relative_error=error, goal=goal)
    table(
        "Speed of the aggregator",
        {
            "case": case,
            "type": str(dtype).removeprefix("torch."),
            "reference": f"{seconds:.2f} s",
            "engine (median)": f"{stats.median:.2f} s",
            "min, max": f"{stats.min:.2f}, {stats.max:.2f} s",
            "speed-up": f"{seconds / stats.median:.1f}x",
            "goal": f"{goal:g}x",
            "error": f"{error:.0e}",
        },
    )


def _memory_row(table: Table, what: str, peak: float, seconds: float, comparison: str, goal: str) -> None:
    table(
        "Peak memory above weights and inputs, fp32",
        {
            "what": what,
            "peak": f"{peak / 2**20:.0f} MiB",
            "seconds": f"{seconds:.0f}",
            "compared": comparison,
            "goal": goal,
        },
    )


@pytest.mark.full
def bench_engine_cpu_memory(benchmark: BenchmarkFixture, table: Table) -> None:
    request = {"variant": "v1-vitl-swinb", "classes": 150, "crops": 5}
    reference = measure(**request, run="reference")
    ours = benchmark.pedantic(lambda: measure(**request, run="torch"), rounds=1)
    ratio = reference["peak_bytes"] / ours["peak_bytes"]
    benchmark.extra_info.update(reference=reference, engine=ours)
    case = "v1-vitl-swinb, T=150, B=5"
    _memory_row(table, f"reference, {case}", reference["peak_bytes"], reference["seconds"], "", "")
    _memory_row(table, f"engine, {case}", ours["peak_bytes"], ours["seconds"], f"1/{ratio:.1f} of it", "1/5")


@pytest.mark.full
def bench_engine_cpu_memory_of_a_large_vocabulary(benchmark: BenchmarkFixture, table: Table) -> None:
    request = {"variant": "v1-vitl-swinb", "crops": 5, "run": "label_map", "policy": "recompute"}
    request["size"] = [1024, 2048]
    few = measure(**request, classes=300)
    many = benchmark.pedantic(lambda: measure(**request, classes=1200), rounds=1)
    benchmark.extra_info.update(classes_300=few, classes_1200=many)
    where = "label map 1024x2048, v1-vitl-swinb, B=5, recompute"
    _memory_row(table, f"{where}, T=300", few["peak_bytes"], few["seconds"], "", "1536 MiB")
    change = many["peak_bytes"] / few["peak_bytes"] - 1
    _memory_row(
        table, f"{where}, T=1200", many["peak_bytes"], many["seconds"], f"{change:+.1%} for 4x the classes",
        "1536 MiB, ±10%",
    )  # fmt: skip
    maps, labels = 1200 * 1024 * 2048 * 4, 1024 * 2048 * 8
    _memory_row(table, "answer: sem_seg, T=1200", maps, 0, "", "")
    _memory_row(table, "answer: label map with scores", labels, 0, f"1/{maps / labels:.0f} of it", "1/50")


@pytest.mark.full
def bench_engine_cpu_training_step(benchmark: BenchmarkFixture, table: Table) -> None:
    request = {"variant": "v2-vitl", "classes": 171, "crops": 1, "pooling": 2}
    reference = measure(**request, run="reference")
    ours = benchmark.pedantic(lambda: measure(**request, run="torch", checkpoint=True), rounds=1)
    benchmark.extra_info.update(reference=reference, engine=ours)
    for what, found, goals in (("reference", reference, ("", "")), ("engine", ours, ("1/2", "1.35x"))):
        table(
            "Training step of the aggregator, v2-vitl, T=171, pooling 2x2, B=1, fp32",
            {
                "what": what,
                "peak": f"{found['peak_bytes'] / 2**20:.0f} MiB",
                "of the reference's": f"{found['peak_bytes'] / reference['peak_bytes']:.2f}",
                "peak to reach": goals[0],
                "seconds": f"{found['seconds']:.1f}",
                "times the reference's": f"{found['seconds'] / reference['seconds']:.2f}x",
                "time to reach": goals[1],
            },
        )


@pytest.mark.parametrize("case", [Case("v2-vitl", 20), Case("v1-vitl-swinb", 33)], ids=str)
def bench_engine_cpu_flops(benchmark: BenchmarkFixture, table: Table, case: Case) -> None:
    rows = benchmark.pedantic(lambda: flop_table(case), rounds=1)
    for stage, reference, ours in rows:
        table(
            f"MFLOP for each class and crop, counted: {case}",
            {
                "stage": stage,
                "reference": f"{reference:.1f}",
                "engine": f"{ours:.1f}",
                "saved": f"{1 - ours / reference:.0%}",
            },
        )
