"""The steps of a campaign, their order, and their shares of the time."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import steps
from bench.bench_headline import _on_a_cpu, _on_a_gpu
from bench.measure import Timing
from bench.records import append
from support.bench_records import make_record

ROOT = Path(__file__).parent.parent


def names(device: str, folder: Path, minutes: float = 5) -> list[str]:
    return [step.name for step in steps.all_steps(device, folder, minutes)]


def test_what_is_worth_most_comes_first(tmp_path: Path) -> None:
    assert names("cuda", tmp_path)[:10] == [
        "environment", "compile", "checks", "headline-ours", "headline-upstream", "headline-compiled",
        "headline-best256", "model", "tune-fp16", "checks-all",
    ]  # fmt: skip
    parts = list(_on_a_gpu())
    assert [f"headline-{part}" for part in parts] == names("cuda", tmp_path)[3:7]
    assert list(_on_a_cpu()) == parts == list(steps.HEADLINES)


def test_the_headline_is_ours_at_three_sizes_with_a_graph_and_upstreams_way() -> None:
    cases = _on_a_gpu()
    ours = [(case.classes, run) for case, run in cases["ours"]]
    assert ours == [(T, run) for T in (150, 1203, 847) for run in ("triton", "graph")]
    assert {case.max_classes for case, _ in cases["best256"]} == {256}
    assert {case.classes for case, _ in cases["best256"]} == {847}


def test_steps_of_a_dry_run(tmp_path: Path) -> None:
    found = {step.name: step for step in steps.all_steps("cpu", tmp_path, 10)}
    for name in ("compile", "tune-fp16", "tune-bf16", "tune-fp32"):
        assert "no GPU" in found[name].reason
        assert not found[name].command
    assert all(step.environment["CUDA_VISIBLE_DEVICES"] == "" for step in found.values() if step.command)
    files = {Path(word).name for step in found.values() for word in step.command if "bench_" in word}
    without_a_gpu = {"bench_host.py"}
    assert files == {path.name for path in (ROOT / "bench").glob("bench_*.py")} - without_a_gpu


def test_no_step_takes_the_time_of_all(tmp_path: Path) -> None:
    """Steps that may hang or be slow have a share of the time; the headline always runs."""
    found = {step.name: step for step in steps.all_steps("cuda", tmp_path, 5)}
    limits = {name: found[name].seconds for name in ("compile", "checks", "headline-compiled", "model")}
    assert limits == {"compile": 75, "checks": 90, "headline-compiled": 75, "model": 75}
    inner = float(found["compile"].command[-1])
    assert inner < 75, "so that it says what it left"
    tuned = [float(step.command[-1]) for name, step in found.items() if name.startswith("tune-")]
    assert tuned == [0.5, 0.5, 0.25]
    assert {name for name, step in found.items() if step.per_machine} == {"environment", "compile"}


def test_a_gpu_is_tuned_in_every_type_before_the_long_benchmarks(tmp_path: Path) -> None:
    found = names("cuda", tmp_path)
    assert found.index("tune-fp32") < found.index("bench-kernels")
    for step in steps.all_steps("cuda", tmp_path, 60):
        assert step.environment.get("XDG_CACHE_HOME", str(tmp_path / "cache")) == str(tmp_path / "cache")


@pytest.mark.parametrize("installed", [True, False])
def test_checks_in_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(steps, "find_spec", lambda _: installed or None)
    checks = {
        workers: next(s for s in steps.all_steps("cuda", tmp_path, 5, workers) if s.name == "checks")
        for workers in (0, 7)
    }
    assert "-n" not in checks[0].command
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in checks[0].environment
    assert ("-n 7" in " ".join(checks[7].command)) == installed
    assert (checks[7].environment.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1") == installed


def measured_kernels(folder: Path, run: str) -> None:
    for index in range(5):
        for dtype, seconds in (("bf16", index), ("fp32", 10 * index)):
            timing = Timing(seconds, seconds, seconds, 5)
            case = f"decode, t={index}, B=1, {dtype}"
            append(folder / "kernels.jsonl", make_record(f"{index}{dtype}", timing, case=case, run=run))


@pytest.mark.parametrize("ncu", ["/usr/bin/ncu", None])
@pytest.mark.parametrize(("device", "run"), [("cuda", "Triton"), ("cpu", "torch")])
def test_the_slowest_kernels_are_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, run: str, ncu: str | None
) -> None:
    monkeypatch.setattr(steps.shutil, "which", lambda _: ncu)
    (nothing,) = steps.profiling_steps(device, tmp_path, 60)
    assert nothing.reason
    measured_kernels(tmp_path, run)
    found = steps.profiling_steps(device, tmp_path, 60)
    assert [step.name for step in found] == [f"profile-decode-t-{t}-B-1-bf16" for t in (4, 3, 2)]
    by_ncu = device == "cuda" and ncu is not None
    assert all((step.command[0] == ncu) == by_ncu for step in found)
    assert all((step.command[-1] == "--torch") == (not by_ncu) for step in found)
    assert all(f"decode, t={t}, B=1, bf16" in step.command for t, step in zip((4, 3, 2), found, strict=True))
    order = names(device, tmp_path, 60)
    assert order.index("bench-kernels") + 1 == order.index("profile-decode-t-4-B-1-bf16")


def test_nsight_compute_is_for_long_campaigns(tmp_path: Path) -> None:
    measured_kernels(tmp_path, "Triton")
    (step,) = steps.profiling_steps("cuda", tmp_path, 20)
    assert not step.command
    assert "more than 20 minutes" in step.reason
    assert len(steps.profiling_steps("cuda", tmp_path, 21)) == steps.PROFILED
