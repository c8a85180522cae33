"""Measure everything on a machine with one command, with all results in one folder.

    python -m bench.campaign --minutes 5 --parallel-checks --output results/h100
    python -m bench.campaign --minutes 60 --output results/h100
    python -m bench.campaign --minutes 5 --device cpu --output results/dry-run

The most valuable measurements come first: all kernels are compiled in parallel; then checks, the figures that
README quotes, and the tuning of the slowest kernels; then the rest. Each step writes into the folder as it
goes. A run that was cut short is resumed by the same command: finished steps are skipped, benchmarks continue
where they stopped, and failed steps are tried again. The folder stays under 10 MB. Tuned configs go into
catseg_fast/configs/ at the end, as with `python -m bench.ship FOLDER`. `python -m bench.pack` makes a folder
for a machine that has no network.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
import torch

from bench import ship
from bench.measure import device_name
from bench.report import write as write_report
from bench.runner import MOST_BYTES, Outcome, left, run, size, unfinished
from bench.steps import WORKERS, all_steps
from catseg_fast.files import write_text

REPORT_SHARE = 0.1  # of the time is kept for the report,
REPORT_SECONDS = 30.0  # but no more than this


class Stopped(KeyboardInterrupt):
    """A signal that ends the campaign; `args` has its number."""


def report(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Write the report, and return its table and the outcome of each step."""
    rows = [f"| {o.name} | {o.state} | {o.seconds:.0f} s | {o.detail} |" for o in outcomes]
    lines = ["| step | state | time | |", "|---|---|---:|---|", *rows]
    text = "\n".join(lines) + "\n"
    measured = sorted(path for path in folder.glob("*.jsonl") if path.stat().st_size)
    if measured:
        text += "\n" + write_report(measured, folder)
    write_text(folder / "campaign.md", text)
    return text


def check_device(folder: Path, device: str) -> None:
    """Check that a folder holds no results of another device.

    Raises:
        ValueError: if it has; the message names both.
    """
    path = folder / "device.txt"
    name = device_name(torch.device(device))
    before = path.read_text(encoding="utf-8").strip() if path.exists() else name
    if before != name:
        raise ValueError(f"--output: {folder} has results of {before!r}; this machine has {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{name}\n")


def main(arguments: Sequence[str] | None = None, begun: float | None = None) -> int:
    """The program; returns its exit code: 1 if a step failed or is not finished, or the folder is too big.

    Args:
        arguments: those of the command line.
        begun: start of the time that counts, from `time.time()`; by default now.
    """
    begun = begun or time.time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, help="time for all steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--parallel-checks", type=int, nargs="?", const=WORKERS, default=0, metavar="N",
        help=f"run the first checks in N processes, {WORKERS} unless said otherwise",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes: {options.minutes:g} is not a positive number")
    if options.device == "cuda" and not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        parser.error(
            f"needs a CUDA GPU; found none, with torch {torch.__version__} {build}. "
            "--device cpu is a dry run of all that needs none"
        )
    folder: Path = options.output
    try:
        check_device(folder, options.device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the step ends, too
        signal.signal(number, _stop)
    total = 60 * options.minutes
    plan = (options.device, folder, options.minutes, options.parallel_checks)
    reserve = min(REPORT_SECONDS, REPORT_SHARE * total)
    try:
        outcomes = run(all_steps(*plan), folder, total - reserve - (time.time() - begun))
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted; not finished: {', '.join(left(all_steps(*plan), folder))}")
        print(f"{folder} keeps what there is, and the same command goes on")
        return 128 + (interrupt.args[0] if isinstance(interrupt, Stopped) else signal.SIGINT)
    print("", report(outcomes, folder), sep="\n")
    if shipped := ship.ship(folder):
        print(ship.describe(shipped))
    taken = size(folder)
    print(f"{folder} holds {taken / 1e6:.1f} MB")
    if missing := unfinished(outcomes):
        print(f"{missing}; the same command goes on where it stopped, and with more --minutes gets further")
    if taken > MOST_BYTES:
        print(f"that is more than {MOST_BYTES / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 1 if missing else 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main(begun=psutil.Process().create_time()))  # importing torch takes seconds
