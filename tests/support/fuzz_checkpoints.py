"""A process that reads hostile checkpoint files, and may crash, under limits of memory and time.

`python -m support.fuzz_checkpoints FOLDER SHARE SEED` writes one file after the other to FOLDER/case.pth,
reads it, and prints a line of JSON at the end. The file that crashes the process stays there.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import random
import resource
import sys
import time
from pathlib import Path

import torch

from catseg_fast.checkpoints.checkpoint import read_checkpoint, recognise_variant
from support.hostile_files import Case, damaged_cases, pickled_cases, program_cases, valid_files

MEMORY = 256 * 2**20  # bytes beyond those that the process has at the start
SECONDS = 1800  # of CPU time


def main(folder: Path, share: float, seed: int) -> None:
    """Read a share of all cases and report what came of them."""
    faulthandler.enable()
    torch.set_num_threads(1)
    rng = random.Random(seed)
    size = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    cases = itertools.chain(
        pickled_cases(rng, share),
        program_cases(rng, int(20_000 * share)),
        damaged_cases(valid_files(folder), rng, int(10_000 * share)),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {"cases": 0, "read": 0, "refused": 0}
    faults: list[str] = []
    longest = (0.0, "")
    for label, data in cases:
        start = time.process_time()
        outcome = read((label, data), folder / "case.pth")
        longest = max(longest, (time.process_time() - start, label))
        counts["cases"] += 1
        if outcome in counts:
            counts[outcome] += 1
        else:
            faults.append(f"{label}: {outcome}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(json.dumps({**counts, "faults": faults[:50], "longest": longest, "grown_mib": grown}))


def read(case: Case, path: Path) -> str:
    """Read a case as a checkpoint and use each value; "read", "refused", or what went wrong."""
    path.write_bytes(case[1])
    try:
        tensors = read_checkpoint(path)
        sum(float(tensor.to(torch.float64).sum()) for tensor in tensors.values())
        sum(float(tensor.contiguous().view(torch.uint8).sum()) for tensor in tensors.values() if tensor.ndim)
        recognise_variant(tensors)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError | RecursionError) or "memory" in str(cause):
                return repr(cause)
            cause = cause.__cause__
        if len(str(error)) > 5000 or not str(error).isprintable():
            return f"message of {len(str(error))} characters: {str(error)[:200]!r}"
        return "read" if str(error).startswith("not a CAT-Seg checkpoint") else "refused"
    except BaseException as error:
        return repr(error)
    return "read"


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
