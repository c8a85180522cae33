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

from bench import campaign, runner, ship
from bench.measure import Timing
from bench.records import append
from bench.runner import Outcome, Step
from catseg_fast.engine import tuner
from catseg_fast.kernels.launch import config_files, configs
from catseg_fast.kernels.window_attention import mlp
from support.bench_records import make_record
from support.gpus import fake_gpus

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
    outcomes = runner.run(steps, tmp_path, 60)
    assert states(outcomes) == {"first": "done", "second": "failed", "third": "not here", "fourth": "done"}
    assert (tmp_path / "first.log").read_text() == "hello\n"
    assert "3" in outcomes[1].detail
    assert (tmp_path / "fourth.log").stat().st_size < 1.1 * runner.MOST_LOG_BYTES
    assert (tmp_path / "fourth.log").read_text().endswith("end\n")


def test_a_campaign_that_runs_out_of_time_goes_on_where_it_was(tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    flag = tmp_path / "flag"
    slow = f"import os, time; os.path.exists({str(flag)!r}) or time.sleep(60)"
    steps = [stand_in("first", count), stand_in("slow", slow), stand_in("last", count)]
    start = time.monotonic()
    outcomes = runner.run(steps, tmp_path, 3)
    assert time.monotonic() - start < 30
    assert states(outcomes) == {"first": "done", "slow": "cut short", "last": "no time left"}
    flag.touch()
    outcomes = runner.run(steps, tmp_path, 60)
    assert states(outcomes) == {"first": "done", "slow": "done", "last": "done"}
    assert (tmp_path / "count").read_text() == "xx", "what is finished does not run again"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_campaign_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    """It is interrupted as with Ctrl-C or by a scheduler, in the middle of a step, which also ends."""
    program = (
        "import os, signal, sys; from bench import campaign; from bench.runner import Step\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "campaign.all_steps = lambda *_: [\n"
        "    Step('first', (sys.executable, '-c', 'pass')),\n"
        "    Step('slow', (sys.executable, '-c',\n"
        "                  'import os, time; print(os.getpid(), flush=True); time.sleep(600)'))]\n"
        "sys.exit(campaign.main(['--device', 'cpu', '--minutes', '9', '--output', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "slow.log", time.monotonic() + 300
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    slow = int(log.read_text())
    child.send_signal(how)
    output, errors = child.communicate(timeout=300)  # in time to see whether the step still runs
    assert child.returncode == 128 + how
    assert b"interrupted; not finished: slow\n" in output
    assert b"the same command goes on" in output
    assert b"Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(slow, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"device.txt", "first.done", "first.log", "slow.log"}
    steps = [stand_in("first", "raise SystemExit('again')"), stand_in("slow", "print(2)")]
    assert states(runner.run(steps, tmp_path, 60)) == {"first": "done", "slow": "done"}
    assert log.read_text() == "2\n"


def test_a_step_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """A step that hangs does not take the time of the others."""
    hanging = Step("hanging", (sys.executable, "-c", "import time; time.sleep(600)"), seconds=1)
    outcomes = runner.run([hanging, stand_in("next", "pass")], tmp_path, 60)
    assert states(outcomes) == {"hanging": "cut short", "next": "done"}


def test_what_belongs_to_a_machine_runs_again_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    compiling = replace(stand_in("compile", count), per_machine=True)
    for boot in ("one", "one", "another"):
        (tmp_path / "boot").write_text(boot)
        monkeypatch.setattr(runner, "BOOT", tmp_path / "boot")
        runner.run([compiling, stand_in("other", count)], tmp_path / "results", 60)
    assert (tmp_path / "count").read_text() == "xx" + "x"


def test_a_done_file_that_was_cut_short_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "only.done").write_text('{"name": "on')
    assert runner.left([stand_in("only", "pass"), Step("elsewhere", reason="no GPU")], tmp_path) == ["only"]
    assert states(runner.run([stand_in("only", "pass")], tmp_path, 60)) == {"only": "done"}
    assert runner.left([stand_in("only", "pass")], tmp_path) == []


def test_too_little_time_says_what_is_missing_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        stand_in("quick", "pass"),
        stand_in("slow", "import time; time.sleep(600)"),
        stand_in("last", ""),
    ]
    monkeypatch.setattr(campaign, "all_steps", lambda *_: steps)
    start = time.monotonic()
    assert campaign.main(["--device", "cpu", "--minutes", "0.05", "--output", str(tmp_path)]) == 1
    assert time.monotonic() - start < 30
    output = capsys.readouterr().out
    assert "not finished: slow (cut short), last (no time left); the same command goes on" in output
    assert "more --minutes" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0", "--device", "cpu"], "--minutes: 0 is not a positive number"),
        (["--minutes", "nan", "--device", "cpu"], "--minutes: nan is not a positive number"),
        (["--minutes", "5"], f"needs a CUDA GPU; found none, with torch {torch.__version__}"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        campaign.main([*arguments, "--output", str(tmp_path / "new")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_results_of_two_devices_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "device.txt").write_text("NVIDIA H200\n")
    with pytest.raises(SystemExit):
        campaign.main(["--device", "cpu", "--minutes", "1", "--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert "has results of 'NVIDIA H200'; this machine has 'CPU " in " ".join(error.split())


def test_the_time_counts_from_when_the_program_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "all_steps", lambda *_: [stand_in("only", "pass")])
    arguments = ["--device", "cpu", "--minutes", "1", "--output", str(tmp_path)]
    assert campaign.main(arguments, begun=time.time() - 60) == 1
    assert campaign.main(arguments) == 0


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
    runner.shorten_logs(tmp_path, 20_000)
    assert runner.size(tmp_path) == 5000 + 8003 + 103, "nothing is cut where all fits"
    runner.shorten_logs(tmp_path, 7000)
    assert runner.size(tmp_path) <= 7000
    assert (tmp_path / "records.jsonl").stat().st_size == 5000
    assert (tmp_path / "long.log").read_bytes().endswith(b"xend")
    assert (tmp_path / "short.log").read_bytes() == b"x" * 100 + b"end"


@pytest.mark.parametrize("size", [1000, runner.MOST_BYTES + 1])
def test_a_folder_above_ten_megabytes_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    steps = [stand_in("only", f"open({str(tmp_path / 'made')!r}, 'w').truncate({size})")]
    monkeypatch.setattr(campaign, "all_steps", lambda *_: steps)
    too_large = size > runner.MOST_BYTES
    code = campaign.main(["--device", "cpu", "--minutes", "1", "--output", str(tmp_path)])
    assert code == too_large
    assert ("more than 10 MB" in capsys.readouterr().err) == too_large


def test_tuned_configs_of_a_campaign_go_into_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU uses its defaults until configs for it are in the package, and those from then on."""
    gpu, package = "NVIDIA H200", tmp_path / "package"
    monkeypatch.setattr(config_files, "SHIPPED", package)
    fake_gpus(monkeypatch, (gpu, 90, 132))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of the user"))

    def problem(hidden: int) -> configs.Problem:
        x = torch.empty(5, 51, 576, 128, dtype=torch.bfloat16, device="meta")
        sizes = {"positions": 576, "channels": 128, "hidden": hidden}
        return configs.Problem.of("window_block", "mlp", mlp.MLPConfig, x, "ieee", **sizes)

    def chosen(hidden: int) -> object:
        configs.clear()
        return configs.choose(problem(hidden), torch.device("cuda", 0), mlp.default_config)

    default = mlp.default_config(90, problem(512))

    def tuned(folder: Path, hidden: int, rows: int) -> None:
        entry = {
            "kernel": "mlp", "version": mlp.MLPConfig.version, "dtype": "bf16", "precision": "ieee",
            "gpu": gpu,
            "shape": {"positions": 576, "channels": 128, "hidden": hidden, "crop_classes": 255},
            "config": asdict(replace(default, rows=rows)),
        }  # fmt: skip
        tuner.save(config_files.config_path(folder, gpu, "window_block"), gpu, entry)

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
