"""Steps that run one after the other in a limited time, and continue where they stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from catseg_fast.files import replacing, write_text

ROOT = Path(__file__).parent.parent
MOST_BYTES = 10_000_000  # of a folder of results
REPORT_BYTES = 1_000_000  # of which so much is for the report
MOST_LOG_BYTES = 2**19
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Step:
    """A command of a campaign.

    Attributes:
        name: name of its files in the folder.
        command: the command, run in the checkout; empty if it cannot run here.
        reason: why it cannot.
        environment: environment variables that are set for it.
        seconds: time after which it is stopped; None for the end of the time of all steps.
        per_machine: whether it runs again on another machine, or after a restart.
    """

    name: str
    command: tuple[str, ...] = ()
    reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    per_machine: bool = False


@dataclass(frozen=True)
class Outcome:
    """Outcome of a step: "done", "failed", "cut short", "no time left" or "not here".

    A step that is "not here" cannot run on this machine, and does not count as unfinished.
    """

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""

    @property
    def finished(self) -> bool:
        """True if there is nothing left to do."""
        return self.state in ("done", "not here")


def run(steps: Iterable[Step], folder: Path, seconds: float) -> list[Outcome]:
    """Run the steps that are not finished, one after the other, until the time is up.

    Args:
        steps: the steps, in order.
        folder: gets `NAME.log`, and `NAME.done` of finished steps.
        seconds: time after which the running step is stopped, and no other is started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes = []
    for step in steps:
        minutes = max(0, deadline - time.monotonic()) / 60
        print(f"[{minutes:.1f} min left] {step.name} …", end=" ", flush=True)
        outcome = _run_step(step, folder, deadline)
        print(f"{outcome.state}, {outcome.seconds:.0f} s {outcome.detail}".rstrip(), flush=True)
        outcomes.append(outcome)
    return outcomes


def unfinished(outcomes: Sequence[Outcome]) -> str:
    """Return a description of the unfinished steps; empty if there are none."""
    names = [f"{outcome.name} ({outcome.state})" for outcome in outcomes if not outcome.finished]
    return f"not finished: {', '.join(names)}" if names else ""


def left(steps: Iterable[Step], folder: Path) -> list[str]:
    """Return the names of the steps that can run here and are not finished."""
    return [
        step.name for step in steps if step.command and _read_done(folder / f"{step.name}.done", step) is None
    ]


def _run_step(step: Step, folder: Path, deadline: float) -> Outcome:
    done = folder / f"{step.name}.done"
    if (before := _read_done(done, step)) is not None:
        return before
    if not step.command:
        return Outcome(step.name, "not here", detail=step.reason)
    start = time.monotonic()
    if start >= deadline:
        return Outcome(step.name, "no time left")
    limit = min(deadline - start, step.seconds or deadline - start)
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
            code = child.wait(timeout=limit)
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
    write_text(done, json.dumps({**asdict(outcome), "machine": _machine()}))
    return outcome


def _read_done(path: Path, step: Step) -> Outcome | None:
    """Return the outcome of a finished step of an earlier run; None for a file that was cut short."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        machine = found.pop("machine", "")
        return None if step.per_machine and machine != _machine() else Outcome(**found)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _machine() -> str:
    """Return an identity of the machine and its last start; empty if the system does not provide it."""
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def shorten_logs(folder: Path, most: int = MOST_BYTES - REPORT_BYTES) -> None:
    """Keep only the ends of long logs, and of more while the folder has more than `most` bytes."""
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
        with replacing(log) as temporary:
            temporary.write_bytes(tail)
        excess -= logs[log] - kept
        logs[log] = kept


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
