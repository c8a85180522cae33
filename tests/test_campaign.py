"""The benchmark campaign, with stand-ins for its slow steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_bench_report import make_record

from bench import campaign, ship
from bench.campaign import Outcome, Step
from bench.measure import Timing
from bench.records import append
from catseg_fast.engine import tuner
from catseg_fast.kernels.launch import configs as tuning
from catseg_fast.kernels.window_attention import mlp

ROOT = Path(__file__).parent.parent


def stand_in(name: str, code: str) -> Step:
    return Step(name, (sys.executable, "-c", code))


def states(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


def test_steps_leave_their_output_and_failures_do_not_stop_the_rest(tmp_path: Path) -> None:
    steps = [
        stand_in("first", "print('hello')"),
        stand_in("second", "raise SystemExit(3)"),
        Step("third", reason="no GPU"),
        stand_in("fourth", "print('x' * 2**20, 'end')"),
    ]
    outcomes = campaign.run(steps, tmp_path, 60)
    assert states(outcomes) == {"first": "done", "second": "failed", "third": "not here", "fourth": "done"}
    assert (tmp_path / "first.log").read_text() == "hello\n"
    assert "3" in outcomes[1].detail
    assert (tmp_path / "fourth.log").stat().st_size < 1.1 * campaign.MOST_LOG_BYTES
    assert (tmp_path / "fourth.log").read_text().endswith("end\n")


def test_a_campaign_that_runs_out_of_time_goes_on_where_it_was(tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    flag = tmp_path / "flag"
    slow = f"import os, time; os.path.exists({str(flag)!r}) or time.sleep(60)"
    steps = [stand_in("first", count), stand_in("slow", slow), stand_in("last", count)]
    start = time.monotonic()
    outcomes = campaign.run(steps, tmp_path, 3)
    assert time.monotonic() - start < 30
    assert states(outcomes) == {"first": "done", "slow": "cut short", "last": "no time left"}
    flag.touch()
    outcomes = campaign.run(steps, tmp_path, 60)
    assert states(outcomes) == {"first": "done", "slow": "done", "last": "done"}
    assert (tmp_path / "count").read_text() == "xx", "what is finished does not run again"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_campaign_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    """Interrupted as with Ctrl-C or by a scheduler, in the middle of a step, which ends, too."""
    program = (
        "import os, signal, sys; from bench import campaign; from bench.campaign import Step\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "campaign.all_steps = lambda *_: [\n"
        "    Step('first', (sys.executable, '-c', 'pass')),\n"
        "    Step('slow', (sys.executable, '-c',\n"
        "                  'import os, time; print(os.getpid(), flush=True); time.sleep(600)'))]\n"
        "sys.exit(campaign.main(['--device', 'cpu', '--minutes', '9', '--output', sys.argv[1]]))"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "slow.log", time.monotonic() + 300
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    slow = int(log.read_text())
    child.send_signal(how)
    _, errors = child.communicate(timeout=300)  # in time to see what is left of the step
    assert child.returncode
    assert b"Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(slow, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"first.done", "first.log", "slow.log"}
    steps = [stand_in("first", "raise SystemExit('again')"), stand_in("slow", "print(2)")]
    assert states(campaign.run(steps, tmp_path, 60)) == {"first": "done", "slow": "done"}
    assert log.read_text() == "2\n"


def test_steps_of_a_dry_run(tmp_path: Path) -> None:
    steps = {step.name: step for step in campaign.measuring_steps("cpu", tmp_path, 10)}
    for dtype in ("bf16", "fp16", "fp32"):
        assert steps[f"tune-{dtype}"].reason
        assert not steps[f"tune-{dtype}"].command
    assert steps["checks"].environment["CUDA_VISIBLE_DEVICES"] == ""
    benchmarks = {Path(step.command[3]).name for name, step in steps.items() if name.startswith("bench-")}
    assert benchmarks == {path.name for path in (ROOT / "bench").glob("bench_*.py")}


def test_a_gpu_is_tuned_in_every_type_before_it_is_measured(tmp_path: Path) -> None:
    steps = campaign.measuring_steps("cuda", tmp_path, 60)
    names = [step.name for step in steps]
    tuning_steps = [step for step in steps if step.name.startswith("tune-")]
    assert [step.command[-3] for step in tuning_steps] == ["bf16", "fp16", "fp32"]
    assert names.index("tune-fp32") < names.index("bench-kernels")
    assert all(step.environment["XDG_CACHE_HOME"] == str(tmp_path / "cache") for step in steps)
    assert sum(float(step.command[-1]) for step in tuning_steps) <= 20, "of 60 minutes"


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
    monkeypatch.setattr(campaign.shutil, "which", lambda _: ncu)
    (nothing,) = campaign.profiling_steps(device, tmp_path)
    assert nothing.reason
    measured_kernels(tmp_path, run)
    steps = campaign.profiling_steps(device, tmp_path)
    assert [step.name for step in steps] == [f"profile-decode-t-{t}-B-1-bf16" for t in (4, 3, 2)]
    by_ncu = device == "cuda" and ncu is not None
    assert all((step.command[0] == ncu) == by_ncu for step in steps)
    assert all((step.command[-1] == "--torch") == (not by_ncu) for step in steps)
    assert all(f"decode, t={t}, B=1, bf16" in step.command for t, step in zip((4, 3, 2), steps, strict=True))
    names = [step.name for step in campaign.all_steps(device, tmp_path, 60)]
    assert names.index("bench-kernels") + 1 == names.index("profile-decode-t-4-B-1-bf16")


def test_the_table_comes_last(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    append(tmp_path / "kernels.jsonl", make_record("x", Timing(1, 1, 1, 5)))
    text = campaign.report([Outcome("kernels", "done", 2.0)], tmp_path)
    assert text == (tmp_path / "campaign.md").read_text()
    assert "| kernels | done | 2 s |" in text
    assert text.index("| kernels | done") < text.index("| kernels | decode")


def test_logs_give_way_when_results_grow(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(b"r" * 5000)
    for name, length in (("long", 8000), ("short", 100)):
        (tmp_path / f"{name}.log").write_bytes(b"x" * length + b"end")
    campaign.shorten_logs(tmp_path, 20_000)
    assert campaign.size(tmp_path) == 5000 + 8003 + 103, "nothing is cut where all fits"
    campaign.shorten_logs(tmp_path, 7000)
    assert campaign.size(tmp_path) <= 7000
    assert (tmp_path / "records.jsonl").stat().st_size == 5000
    assert (tmp_path / "long.log").read_bytes().endswith(b"xend")
    assert (tmp_path / "short.log").read_bytes() == b"x" * 100 + b"end"


@pytest.mark.parametrize("size", [1000, campaign.MOST_BYTES + 1])
def test_a_folder_above_ten_megabytes_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    steps = [stand_in("only", f"open({str(tmp_path / 'made')!r}, 'w').truncate({size})")]
    monkeypatch.setattr(campaign, "all_steps", lambda *_: steps)
    too_large = size > campaign.MOST_BYTES
    code = campaign.main(["--device", "cpu", "--minutes", "1", "--output", str(tmp_path)])
    assert code == too_large
    assert ("more than 10 MB" in capsys.readouterr().err) == too_large


def test_tuned_configs_of_a_campaign_go_into_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU has its defaults until configs for it are in the package, and from then on those."""
    gpu, package = "NVIDIA H200", tmp_path / "package"
    monkeypatch.setattr(tuning, "SHIPPED", package)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of the user"))

    def problem(hidden: int) -> tuning.Problem:
        x = torch.empty(5, 51, 576, 128, dtype=torch.bfloat16, device="meta")
        sizes = {"positions": 576, "channels": 128, "hidden": hidden}
        return tuning.Problem.of("window_block", "mlp", mlp.MLPConfig, x, "ieee", **sizes)

    def chosen(hidden: int) -> object:
        tuning.clear()
        return tuning.choose(problem(hidden), torch.device("cuda", 0), mlp.default_config)

    default = mlp.default_config(90, problem(512))

    def tuned(folder: Path, hidden: int, rows: int) -> None:
        entry = {
            "kernel": "mlp", "dtype": "bf16", "precision": "ieee", "gpu": gpu,
            "shape": {"positions": 576, "channels": 128, "hidden": hidden, "crop_classes": 255},
            "config": asdict(replace(default, rows=rows)),
        }  # fmt: skip
        tuner.save(tuning.config_path(folder, gpu, "window_block"), gpu, entry)

    assert ship.ship(tmp_path, package) == {}
    assert chosen(512) == chosen(256) == default
    tuned(package, 512, 16)
    tuned(package, 256, 16)
    tuned(tmp_path / ship.TUNED, 512, 32)
    assert ship.ship(tmp_path, package) == {package / "nvidia-h200" / "window_block.json": 1}
    assert chosen(512) == replace(default, rows=32)
    assert chosen(256) == replace(default, rows=16), "what was tuned for other launches stays"
    assert ship.main([str(tmp_path / "nothing")]) == 1
    assert "no tuned configs" in capsys.readouterr().err
