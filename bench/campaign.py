"""Everything that there is to measure on a machine, in one command, with all results in one folder.

    python -m bench.campaign --minutes 60 --output results/h200
    python -m bench.campaign --minutes 20 --device cpu --output results/dry-run

Each step writes into the folder as it goes. A run that was cut short is resumed by the same command: finished
steps are passed over, benchmarks go on where they stopped. What failed is tried again. The folder stays under
10 MB. Tuned configs go into catseg_fast/configs/ at the end, as `python -m bench.ship FOLDER` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench import records, ship
from bench.report import write as write_report
from catseg_fast.files import replacing

ROOT = Path(__file__).parent.parent
BENCHMARKS = ("kernels", "ablation", "model", "label_map", "scaling", "aggregator")  # the longest ones last
CPU_BENCHMARKS = (*BENCHMARKS, "engine")
MOST_BYTES = 10_000_000
REPORT_BYTES = 1_000_000  # of which so much is for the report
MOST_LOG_BYTES = 2**19
PROFILED = 3
TUNED = {"bf16": 0.1, "fp16": 0.1, "fp32": 0.05}  # shares of the time


@dataclass(frozen=True)
class Step:
    """A command of a campaign.

    Attributes:
        name: of its files in the folder.
        command: what is run, in the checkout; empty where it cannot run here.
        reason: why not.
        environment: variables that are set for it.
    """

    name: str
    command: tuple[str, ...] = ()
    reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a step: "done", "failed", "cut short", "no time left" or "not here".

    What is "not here" cannot run on this machine, and does not count as unfinished.
    """

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""


def run(steps: Iterable[Step], folder: Path, seconds: float) -> list[Outcome]:
    """Run the steps that are not finished, one after the other, until the time is up.

    Args:
        steps: in order.
        folder: gets `NAME.log`, and `NAME.done` of finished steps.
        seconds: after which a step is stopped, and no other begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes = []
    for step in steps:
        left = max(0, deadline - time.monotonic()) / 60
        print(f"[{left:.1f} min left] {step.name} …", end=" ", flush=True)
        outcome = _run_step(step, folder, deadline)
        print(f"{outcome.state}, {outcome.seconds:.0f} s {outcome.detail}".rstrip(), flush=True)
        outcomes.append(outcome)
    return outcomes


def _run_step(step: Step, folder: Path, deadline: float) -> Outcome:
    done = folder / f"{step.name}.done"
    if done.exists():
        return Outcome(**json.loads(done.read_text(encoding="utf-8")))
    if not step.command:
        return Outcome(step.name, "not here", detail=step.reason)
    start = time.monotonic()
    if start >= deadline:
        return Outcome(step.name, "no time left")
    log = folder / f"{step.name}.log"
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            step.command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **step.environment},
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=deadline - start)
        except subprocess.TimeoutExpired:
            return Outcome(step.name, "cut short", time.monotonic() - start, f"see {log.name}")
        finally:  # of an interruption, too
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with what it started
                child.wait()
            shorten_logs(folder)
    if code:
        return Outcome(step.name, "failed", time.monotonic() - start, f"exit code {code}, see {log.name}")
    outcome = Outcome(step.name, "done", time.monotonic() - start)
    with replacing(done) as temporary:
        temporary.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    return outcome


def all_steps(device: str, folder: Path, minutes: float) -> Iterator[Step]:
    """Those of a campaign; profiles come as soon as it is known of what."""
    for step in measuring_steps(device, folder, minutes):
        yield step
        if step.name == "bench-kernels":
            yield from profiling_steps(device, folder)


def measuring_steps(device: str, folder: Path, minutes: float) -> list[Step]:
    """Checks, tuning and benchmarks on "cuda", or all that there is of them on "cpu"."""
    folder, python, gpu = folder.resolve(), sys.executable, device == "cuda"
    environment = _environment(device, folder)
    check = (python, "-m", "pytest", "-m", "gpu" if gpu else "not gpu", "tests/test_real_shapes.py")
    steps = [
        Step("environment", (python, "-m", "catseg_fast", "env"), environment=environment),
        Step("checks", check, environment=environment),
    ]
    for dtype, share in TUNED.items():
        tune = (
            python, "-m", "catseg_fast", "tune", "--dtype", dtype, "--minutes", f"{share * minutes:g}",
        )  # fmt: skip
        name = f"tune-{dtype}"
        steps.append(
            Step(name, tune, environment=environment)
            if gpu
            else Step(name, reason="there is no GPU to tune for")
        )
    for name in BENCHMARKS if gpu else CPU_BENCHMARKS:
        command = (
            python, "-m", "pytest", f"bench/bench_{name}.py", "--benchmark-only",
            "--records", str(folder / f"{name}.jsonl"),
        )  # fmt: skip
        steps.append(Step(f"bench-{name}", command, environment=environment))
    return steps


def _environment(device: str, folder: Path) -> dict[str, str]:
    """The folder is where the kernels find what was tuned; what no kernel runs is an error."""
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return {"XDG_CACHE_HOME": str(folder.resolve() / "cache"), "CATSEG_FAST_STRICT": "1", **hidden}


def profiling_steps(device: str, folder: Path) -> list[Step]:
    """A profile of each of the slowest kernels in bf16: by Nsight Compute, or else by torch."""
    path, run = folder / "kernels.jsonl", "Triton" if device == "cuda" else "torch"
    measured = records.read([path]) if path.exists() else []
    measured = [record for record in measured if record.run == run and record.case.endswith("bf16")]
    if not measured:
        return [Step("profile", reason="no kernel was measured")]
    ncu = shutil.which("ncu") if device == "cuda" else None
    profiler = (ncu, "--set", "full", "--profile-from-start", "off") if ncu else ()
    steps = []
    for record in sorted(measured, key=lambda record: -record.median)[:PROFILED]:
        command = (*profiler, sys.executable, "-m", "bench.run_stage", record.case, "--device", device)
        name = "profile-" + re.sub(r"\W+", "-", record.case)
        command = command if ncu else (*command, "--torch")
        steps.append(Step(name, command, environment=_environment(device, folder)))
    return steps


def report(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Write the report of what was measured, and return the table and what came of each step."""
    rows = [f"| {o.name} | {o.state} | {o.seconds:.0f} s | {o.detail} |" for o in outcomes]
    lines = ["| step | state | time | |", "|---|---|---:|---|", *rows]
    text = "\n".join(lines) + "\n"
    measured = sorted(folder.glob("*.jsonl"))
    if measured:
        text += "\n" + write_report(measured, folder)
    (folder / "campaign.md").write_text(text, encoding="utf-8")
    return text


def shorten_logs(folder: Path, most: int = MOST_BYTES - REPORT_BYTES) -> None:
    """Keep the ends alone of long logs, and of more while the folder has more than `most` bytes."""
    logs = {log: log.stat().st_size for log in folder.glob("*.log")}
    excess = size(folder) - most
    while logs:
        log = max(logs, key=logs.__getitem__)
        kept = min(MOST_LOG_BYTES, logs[log] if excess <= 0 else logs[log] // 2)
        if kept == logs[log] or not kept:
            return
        with log.open("rb") as file:
            file.seek(-kept, os.SEEK_END)
            tail = file.read()
        log.write_bytes(tail)
        excess -= logs[log] - kept
        logs[log] = kept


def size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 1 if a step failed or is not finished, or the folder is too big."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, help="time for all steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu is a dry run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the step ends, too
    folder = options.output
    steps = all_steps(options.device, folder, options.minutes)
    try:
        outcomes = run(steps, folder, 60 * options.minutes)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {folder} keeps what there is, and the same command goes on")
        return 128 + signal.SIGINT
    print("", report(outcomes, folder), sep="\n")
    if shipped := ship.ship(folder):
        print(ship.describe(shipped))
    taken = size(folder)
    print(f"{folder} holds {taken / 1e6:.1f} MB")
    if taken > MOST_BYTES:
        print(f"that is more than {MOST_BYTES / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 0 if all(outcome.state in ("done", "not here") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
