"""The benchmark campaign, with stand-ins for its slow steps."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import campaign
from bench.campaign import Outcome, Step
from bench.measure import Timing
from bench.records import append
from test_bench_report import make_record

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


def test_an_interrupted_campaign_goes_on_where_it_was(tmp_path: Path) -> None:
    """Interrupted as with Ctrl-C, in the middle of a step."""
    program = (
        "import sys; from pathlib import Path; from bench.campaign import Step, run\n"
        "steps = [Step('first', (sys.executable, '-c', 'pass')),\n"
        "         Step('slow', (sys.executable, '-c',\n"
        "                       'import time; print(1, flush=True); time.sleep(60)'))]\n"
        "run(steps, Path(sys.argv[1]), 50)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "slow.log", time.monotonic() + 40
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    assert child.returncode
    assert {path.name for path in tmp_path.iterdir()} == {"first.done", "first.log", "slow.log"}
    steps = [stand_in("first", "raise SystemExit('again')"), stand_in("slow", "print(2)")]
    assert states(campaign.run(steps, tmp_path, 60)) == {"first": "done", "slow": "done"}
    assert log.read_text() == "2\n"


def test_steps_of_a_dry_run(tmp_path: Path) -> None:
    steps = {step.name: step for step in campaign.measuring_steps("cpu", tmp_path, 10)}
    assert steps["tune"].reason
    assert not steps["tune"].command
    assert steps["checks"].environment["CUDA_VISIBLE_DEVICES"] == ""
    benchmarks = {Path(step.command[3]).name for name, step in steps.items() if name.startswith("bench-")}
    assert benchmarks == {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    assert campaign.profiling_steps("cpu", tmp_path)[0].reason


def test_the_slowest_kernels_are_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign.shutil, "which", lambda _: "/usr/bin/ncu")
    for index in range(5):
        record = make_record(f"x{index}", Timing(index, index, index, 5), case=f"case {index}", run="Triton")
        append(tmp_path / "kernels.jsonl", record)
    steps = campaign.profiling_steps("cuda", tmp_path)
    assert [step.command[-1] for step in steps] == ["case 4", "case 3", "case 2"]


def test_the_table_comes_last(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    append(tmp_path / "kernels.jsonl", make_record("x", Timing(1, 1, 1, 5)))
    text = campaign.report([Outcome("kernels", "done", 2.0)], tmp_path)
    assert text == (tmp_path / "campaign.md").read_text()
    assert "| kernels | done | 2 s |" in text
    assert text.index("| kernels | done") < text.index("| kernels | decode")
