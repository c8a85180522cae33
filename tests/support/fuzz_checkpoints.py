"""A process that has its children read hostile checkpoint files, under limits of memory and time.

`python -m support.fuzz_checkpoints FOLDER SHARE SEED PART PARTS` reads a share of all files, or a part of
that, and prints a line of JSON at the end. A child reads some hundred files. Where one crashes it, or takes
it beyond a limit, the file stays in FOLDER, and the next child goes on behind it.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import mmap
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catseg_fast.checkpoints.checkpoint import read_checkpoint, recognise_variant
from catseg_fast.checkpoints.hub import BUNDLED
from support.hostile_archives import archive_cases, safetensors_cases
from support.hostile_files import Case, damaged_cases, pickled_cases, program_cases, valid_files
from support.other_readers import NotRead, read_otherwise

MEMORY = 256 * 2**20  # bytes that a child may take besides what it starts with
SECONDS = 60  # that a child may take
FILES = 500  # that a child reads; it takes about a second


class Outcome(IntEnum):
    """What became of a file; the numbers are what a child leaves in shared memory."""

    CRASHED = 0  # the child ended before anything else was known
    REFUSED = 1
    READ = 2  # and torch's or another reader refuses it, or crashes
    EQUAL = 3  # to what torch's or another reader reads
    FAULT = 4


def all_cases(folder: Path, share: float, seed: int) -> Iterator[Case]:
    """A share of all hostile files; the same for the same seed."""
    rng = random.Random(seed)
    return itertools.chain(
        pickled_cases(rng, share),
        program_cases(rng, int(20_000 * share)),
        damaged_cases(valid_files(folder), rng, int(10_000 * share)),
        archive_cases(rng, int(20_000 * share)),
        safetensors_cases(rng, int(20_000 * share)),
    )


def main(folder: Path, share: float, seed: int, part: int, parts: int) -> None:
    """Read part `part` of `parts` of a share of all cases, and report what came of them."""
    torch.set_num_threads(1)
    read(BUNDLED["demo"])  # imports what is imported late, once for all children
    cases = itertools.islice(all_cases(folder, share, seed), part, None, parts)
    counts: Counter[str] = Counter(dict.fromkeys((outcome.name.lower() for outcome in Outcome), 0))
    faults: list[str] = []
    longest = (0.0, "")
    grown = 0
    while batch := list(itertools.islice(cases, FILES)):
        while batch:
            outcomes, seconds, status, memory = read_in_a_child(batch, folder)
            grown = max(grown, memory)
            done = len(batch)
            if status:
                done = int(np.flatnonzero(seconds)[-1]) + 1 if seconds.any() else 1
            for (label, data), outcome, duration in zip(batch[:done], outcomes, seconds, strict=False):
                counts["cases"] += 1
                counts[Outcome(outcome).name.lower()] += 1
                longest = max(longest, (float(duration), label))
                if outcome == Outcome.CRASHED:
                    faults.append(f"{label}: the process ended with status {status}")
                    (folder / f"crash-{len(faults)}.pth").write_bytes(data)
            batch = batch[done:]
    faults += (folder / "faults.txt").read_text().splitlines() if (folder / "faults.txt").exists() else []
    report = {**counts, "faults": faults[:50], "longest": longest, "grown_mib": grown // 1024}
    print(json.dumps(report))


def read_in_a_child(batch: list[Case], folder: Path) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Read files in a forked process.

    Returns:
        Of each file the outcome and the CPU seconds, 0 where it was not reached; the exit status; the KiB by
        which the process has grown.
    """
    size = len(batch)
    shared = mmap.mmap(-1, 9 * size)
    seconds = np.frombuffer(shared, np.float64, size)
    outcomes = np.frombuffer(shared, np.uint8, size, offset=8 * size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        status = 1
        try:
            limit()
            for index, case in enumerate(batch):
                read_case(case, folder, outcomes[index : index + 1], seconds[index : index + 1])
            status = 0
        finally:
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    return outcomes.copy(), seconds.copy(), status, usage.ru_maxrss - before


def limit() -> None:
    """Limit this process's memory, and its time, on the CPU and on the clock."""
    faulthandler.enable()
    size = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(10 * SECONDS)


def read_case(case: Case, folder: Path, outcome: Any, seconds: Any) -> None:
    """Read a case, and store in the two arrays of one element what came of it and how long it took."""
    path = folder / "case.pth"
    path.write_bytes(case[1])
    seconds[0] = 1e-9  # it was reached
    start = time.process_time()
    found = read(path)
    seconds[0] += time.process_time() - start
    if found is None:
        outcome[0] = Outcome.REFUSED
        return
    if isinstance(found, dict):
        outcome[0] = Outcome.READ
        try:
            expected = read_otherwise(path)
        except NotRead:
            return
        if same(found, expected):
            outcome[0] = Outcome.EQUAL
            return
        found = "its tensors differ from what another reader reads"
    outcome[0] = Outcome.FAULT
    with (folder / "faults.txt").open("a") as file:
        file.write(f"{case[0]}: {found}\n")


def read(path: Path) -> dict[str, Tensor] | str | None:
    """Read a file and use each value; the tensors, None if it is refused, or what went wrong."""
    try:
        tensors = read_checkpoint(path)
        sum(float(tensor.to(torch.float64).sum()) for tensor in tensors.values())
        sum(float(tensor.contiguous().view(torch.uint8).sum()) for tensor in tensors.values() if tensor.ndim)
    except ValueError as error:
        return why_no_refusal(error)
    except BaseException as error:
        return repr(error)
    try:
        recognise_variant(tensors)
    except ValueError as error:
        return why_no_refusal(error) or tensors
    except BaseException as error:
        return repr(error)
    return tensors


def why_no_refusal(error: ValueError) -> str | None:
    """What is wrong with an error; None if it is one that a user can read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | RecursionError) or "memory" in str(cause):
            return repr(cause)
        cause = cause.__cause__
    if len(str(error)) > 5000 or not str(error).isprintable():
        return f"message of {len(str(error))} characters: {str(error)[:200]!r}"
    return None


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Check that tensors are equal bit by bit."""
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[key].dtype
        and tensor.shape == expected[key].shape
        and torch.equal(bits(tensor), bits(expected[key]))
        for key, tensor in found.items()
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:]))
