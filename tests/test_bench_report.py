"""The benchmarks' gate, their records, and the report's regression mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bench import gate, peak_memory, plots, records, report
from bench.ablation import STEPS
from bench.baselines import BASELINES
from bench.bench_aggregator import measure
from bench.cases import Case, make_call
from bench.flops import call_flop, count, stage_flop
from bench.measure import Timing, time_call
from bench.meter import Meter
from bench.stage_calls import STAGES, make_stage_call
from support.bench_records import make_record, write_benchmark_file

CPU = torch.device("cpu")


@pytest.fixture
def measured(tmp_path: Path) -> Callable[[str, int], Path]:
    """Time two stages, the last one with a kernel that runs several times, into a file."""

    @torch.no_grad()
    def measure(name: str, repeats: int) -> Path:
        first = make_stage_call("class_collect", 1, 1, torch.float32, CPU)
        second = make_stage_call("window_block", 1, 1, torch.float32, CPU)

        def slowed() -> Tensor:
            for _ in range(repeats):
                answer = second.plain()
            return answer

        calls = {"first": first.plain, "second": slowed}
        timings = {key: time_call(call, CPU) for key, call in calls.items()}
        return write_benchmark_file(tmp_path / name, [make_record(*item) for item in timings.items()])

    return measure


def test_a_deliberately_slowed_kernel_is_a_regression(
    measured: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old, slowed = measured("old.json", 1), measured("new.json", 20)
    assert report.main(["--compare", str(old), str(slowed)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| second"))
    assert "SLOWER" in line
    assert line.count("(") == 2, "both spreads are shown"
    assert report.main(["--compare", str(old), str(old)]) == 0


@pytest.mark.parametrize(("change", "code"), [(1.04, 0), (1.06, 1), (0.5, 0)])
def test_five_per_cent_pass_for_noise(tmp_path: Path, change: float, code: int) -> None:
    old, new = (
        write_benchmark_file(tmp_path / f"{name}.json", [make_record("x", Timing(s, s, s, 5))])
        for name, s in (("old", 1.0), ("new", change))
    )
    assert report.main(["--compare", str(old), str(new)]) == code


def test_results_of_different_devices_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record("x", Timing(1, 1, 1, 5))
    old = write_benchmark_file(tmp_path / "old.json", [record])
    new = write_benchmark_file(tmp_path / "new.json", [replace(record, device="another")])
    assert report.main(["--compare", str(old), str(new)]) == 2
    assert "another" in capsys.readouterr().err


def test_records_are_kept_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    first, second = (make_record("x", Timing(s, s, s, 5)) for s in (1.0, 2.0))
    for record in (first, replace(first, id="y"), second):
        records.append(path, record)
    with path.open("a") as file:
        file.write('{"id": "cut sho')
    assert records.read([path]) == [second, replace(first, id="y")]
    records.append(path, first)
    assert records.read([path]) == [first, replace(first, id="y")], "what was cut short is gone"


def test_what_is_no_more_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, lost = (make_record(name, Timing(1, 1, 1, 5)) for name in ("kept", "lost"))
    old = write_benchmark_file(tmp_path / "old.json", [kept, lost])
    new = write_benchmark_file(tmp_path / "new.json", [kept])
    assert report.main(["--compare", str(old), str(new)]) == 0
    assert f"not in {new}: lost" in capsys.readouterr().out


def test_steps_are_drawn_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has measured them in another order."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn: list[str] = []
    set_yticks = Axes.set_yticks

    def recording(axes: Axes, ticks: Any, labels: Any = None, **options: Any) -> Any:
        drawn.extend(labels or ())
        return set_yticks(axes, ticks, labels, **options)

    monkeypatch.setattr(Axes, "set_yticks", recording)
    timing = Timing(2e-3, 1e-3, 3e-3, 5)
    found = [make_record(step, timing, group="ablation", run=step) for step in reversed(STEPS)]
    plots.draw_all(found, tmp_path)
    assert drawn == list(STEPS)


def test_report_has_a_row_for_each_record_and_the_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timing = Timing(2e-3, 1e-3, 3e-3, 5)
    scaling = {"group": "scaling", "peak_bytes": 2**20}
    found = [
        make_record("kernel", timing),
        *(
            make_record(f"{run}{T}", timing, **scaling, case=f"v2-vitl, T={T}, B=1", run=run, classes=T)
            for T in (4, 16)
            for run in ("(a) reference", "(d) engine")
        ),
        *(make_record(step, timing, group="ablation", run=step) for step in ("reference", "+ streaming")),
    ]
    text = report.write([write_benchmark_file(tmp_path / "r.json", found)], tmp_path / "report")
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(found) + 2
    assert "0.5" in next(line for line in text.splitlines() if "decode" in line), "1 GFLOP in 2 ms"
    drawn = {path.name for path in (tmp_path / "report").iterdir()}
    assert drawn == {"table.md", "time.png", "memory.png", "roofline.png", "ablation.png"}


def test_report_of_no_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        report.main([str(write_benchmark_file(tmp_path / "none.json", [])), "--output", str(tmp_path)]) == 2
    )
    assert "no results" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_a_deliberately_wrong_kernel_does_not_pass_the_gate(stage: str) -> None:
    """A fault: drop the last channel, class or pixel."""
    call = make_stage_call(stage, 1, 2, torch.float32, CPU)
    truth = call.to(torch.float64).plain()
    assert gate.check(call.plain(), call.plain(), truth) == 1
    wrong = call.plain()
    wrong[..., -1] = 0
    with pytest.raises(gate.WrongAnswer, match="no speed"):
        gate.check(wrong, call.plain(), truth)


def test_the_gate_stops_numbers_that_are_none() -> None:
    truth = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(gate.WrongAnswer):
        gate.check(torch.full((4,), torch.nan), torch.full((4,), 0.1), truth)
    with pytest.raises(gate.WrongAnswer, match="shape"):
        gate.check(torch.zeros(3), torch.zeros(4), truth)


@pytest.mark.xdist_group("operations")  # which are counted once per process
@pytest.mark.parametrize("variant", ["v2-vitl", "v1-vitl-swinb"])
def test_operations_are_those_of_the_design(variant: str) -> None:
    """By design: GFLOP per class and crop of the reference, and at most of the restructured maths."""
    reference, ours = (flop / (256 * 5) / 1e9 for flop in call_flop(Case(variant, 256, 5)))
    assert reference == pytest.approx({"v2-vitl": 2.88, "v1-vitl-swinb": 3.52}[variant], abs=0.01)
    assert 1.5 < ours < 2.5


@torch.no_grad()
def test_operations_of_stages_are_those_of_the_design() -> None:
    """By design: MFLOP per class; those of the CPU's fused attention count, too."""
    ours = count(make_stage_call("window_block", 1, 2, torch.float32, CPU).plain) / 2
    reference = {
        name: stage_flop(name, "v2-vitl", 2, 1) for name in ("window_block", "decode", "class_apply")
    }
    assert reference["class_apply"] is None
    assert (reference["window_block"] or 0) / 2e6 == pytest.approx(307, abs=1)
    assert ours == pytest.approx(307 - 38, abs=1)
    assert (reference["decode"] or 0) / 2e6 == pytest.approx(1138, abs=10)


@pytest.mark.xdist_group("operations")  # which are counted once per process
def test_dropped_classes_cost_only_their_selection() -> None:
    few, all_aggregated, dropping = (
        call_flop(Case("v2-vitl", classes, dtype=torch.float16, max_classes=kept))
        for classes, kept in ((256, None), (512, None), (512, 256))
    )
    for kept, every, some in zip(few, all_aggregated, dropping, strict=True):
        assert kept < some < 1.01 * kept
        assert some < 0.6 * every


def test_baselines_say_where_they_do_not_run() -> None:
    bf16 = Case("v2-vitl", 4, dtype=torch.bfloat16)
    reasons = {baseline.name: baseline.unavailable(bf16, CPU) for baseline in BASELINES}
    assert len(reasons) == len(BASELINES)
    for name, reason in reasons.items():
        if name.startswith("(a)"):
            assert "dtype" in reason or "float" in reason
        elif name.startswith("(e)") or "max-autotune" in name:
            assert "GPU" in reason
        else:
            assert reason is None


@pytest.mark.parametrize("start", ["(a)", "(d)"])
def test_a_baseline_computes_the_case(start: str) -> None:
    case = Case("v1-vitl-swinb", 2)
    baseline = next(baseline for baseline in BASELINES if baseline.name.startswith(start))
    answer = baseline.prepare(make_call(case))()
    assert gate.check(answer, *gate.expected(case, case.dtype, CPU)) <= gate.FACTOR


def test_no_speed_is_measured_of_a_wrong_baseline() -> None:
    wrong = replace(BASELINES[-3], prepare=lambda call: lambda: call() + 1e-3)
    meter = cast(Meter, SimpleNamespace(device=CPU))  # which cannot be called
    with pytest.raises(gate.WrongAnswer, match="no speed"):
        measure("aggregator", meter, Case("v1-vitl-swinb", 2), wrong)


def test_peak_memory_is_that_of_one_call() -> None:
    sizes = (2**26, 2**28, 2**25, 2**26)
    peaks = [peak_memory.measure(partial, bytearray, size) for size in sizes]
    if None in peaks:
        pytest.skip("the system does not tell a process's peak memory")
    assert [peak.bytes for peak in peaks if peak] == [pytest.approx(size, rel=0.05) for size in sizes]
