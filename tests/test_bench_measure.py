"""The number of timed calls, and the part of a GPU's profile that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, plots, profiling, raw_runs, records, report
from bench.measure import Timing
from bench.records import append
from support.bench_records import make_record

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize(("seconds", "rounds"), [(1e-3, 30), (0.1, 10), (0.3, 3), (0.78, 3), (60.0, 3)])
def test_rounds_fit_a_second(device: torch.device, seconds: float, rounds: int) -> None:
    """So the slowest case, of 0.78 s, takes a few seconds and not 47."""
    assert measure.rounds_of(seconds, device) == rounds


def test_a_call_is_timed_as_often_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(measure, "clock", lambda call, device: call() or 0.2)
    timing = measure.time_call(lambda: calls.append(None), CPU)
    assert timing.rounds == 5
    assert len(calls) == 6


def test_a_profile_adds_up_the_launches_of_each_kernel() -> None:
    long = "void at::native::" + "x" * 200
    events = [("qkv_kernel", 2e-3), (long, 1e-3), ("mlp_kernel", 4e-3), ("qkv_kernel", 3e-3)]
    assert profiling.summarise(events) == {
        "busy": pytest.approx(10e-3),
        "launches": 4,
        "kernels": [
            ("qkv_kernel", 5e-3, 2),
            ("mlp_kernel", 4e-3, 1),
            (long[: profiling.NAME_LENGTH], 1e-3, 1),
        ],
    }
    assert profiling.summarise([]) == {}
    assert len(profiling.summarise((f"kernel {n}", 1.0) for n in range(100))["kernels"]) == profiling.KEPT
    assert profiling.profile_call(lambda: None, CPU) == {}


def profiled(T: int, busy: float, **facts: Any) -> records.Record:
    return make_record(
        f"T={T}, {busy}", Timing(10e-3, 9e-3, 11e-3, 5), group="scaling", run="(e) engine, Triton",
        case=f"v2-vitl, T={T}, B=5, fp16", classes=T, busy=busy, launches=7, **facts,
    )  # fmt: skip


def test_a_profile_is_kept_in_the_records(tmp_path: Path) -> None:
    record = profiled(150, 6e-3, kernels=[("qkv_kernel", 4e-3, 2), ("void at::x", 2e-3, 5)])
    append(tmp_path / "records.jsonl", record)
    assert records.read([tmp_path / "records.jsonl"]) == [record]
    assert plots.profile_parts(record) == {
        "qkv": 4e-3,
        "PyTorch's kernels": pytest.approx(2e-3),
        "no kernel runs": pytest.approx(4e-3),
    }


def test_a_plot_shows_the_best_profile_of_each_size_with_one_order_of_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    bars: list[float] = []
    barh = Axes.barh

    def recording(axes: Axes, place: float, width: float, *arguments: Any, **options: Any) -> Any:
        bars.append(round(width, 6))
        return barh(axes, place, width, *arguments, **options)

    monkeypatch.setattr(Axes, "barh", recording)
    kernels = {
        150: [("qkv_kernel", 4e-3, 2), ("mlp_kernel", 1e-3, 2)],
        1203: [("mlp_kernel", 5e-3, 2), ("qkv_kernel", 2e-3, 2)],
    }
    found = [profiled(T, 8e-3, kernels=kernels[T]) for T in (150, 1203)]
    found.append(profiled(150, 9e-3, kernels=[("qkv_kernel", 9e-3, 2)]))
    drawn = {path.name for path in plots.draw_all(found, tmp_path)}
    assert drawn == {"time.png", "profile.png"}
    assert bars == [4, 1, 3, 2, 2, 5, 1, 2]


@pytest.mark.xdist_group("operations")  # which are counted once per process
def test_the_h200s_report_has_its_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = sorted((report.OUTPUT.parent / "h200").glob("*.json"))
    text = report.write(paths, tmp_path)
    assert (tmp_path / "table.md").read_text() == (report.OUTPUT.parent / "h200/report/table.md").read_text()
    assert text.startswith("- NVIDIA H200: torch 2.11.0+cu130, triton 3.6.0, python 3.12, 2c79cdd; ")
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in (report.OUTPUT.parent / "h200/report").glob("*.png")}
    assert len(raw_runs.read(paths)) == sum(line.startswith("| ") for line in text.splitlines()) - 2


def test_a_run_of_an_unknown_name_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"gpu": "NVIDIA H200", "runs": {"v2-vitl": {"time": {"median": 1}}}}')
    with pytest.raises(ValueError, match=r"run\.json: 'v2-vitl' is not the name of a run"):
        raw_runs.read([path])
