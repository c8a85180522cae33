"""The measurement of one benchmark: time, memory, shares of the device's best rates, and their record."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import peak_memory, records
from bench.measure import (
    Timing,
    clock,
    copy_bandwidth,
    device_name,
    matmul_rate,
    peak_bytes,
    rounds_of,
    time_call,
    versions,
)
from bench.profiling import profile_call
from bench.records import Record
from bench.tables import cells

HOST_ROUNDS = 5
COMMIT = Path(__file__).parent.parent / "COMMIT"  # of a packed tree


class Meter:
    """Measures the calls of one benchmark.

    Args:
        id: pytest's name of the benchmark.
        benchmark: pytest-benchmark's fixture; its file gets the record as `extra_info`.
        device: where the calls run.
        path: file of records, or None.
        add_row: adds a row to the table of a title.
    """

    def __init__(
        self,
        id: str,
        benchmark: BenchmarkFixture,
        device: torch.device,
        path: Path | None,
        add_row: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.id, self.benchmark, self.device = id, benchmark, device
        self.path, self.add_row = path, add_row

    def __call__(
        self,
        call: Callable[[], Any],
        *,
        group: str,
        case: Any,
        run: str,
        dtype: torch.dtype,
        remake: Sequence[Any] = (),
        profiled: bool = False,
        **facts: Any,
    ) -> Record:
        """Measure a call whose result was checked.

        Args:
            call: what is timed; it has been called before.
            group, case, run: as in `Record`.
            dtype: type of the matrix products that it is compared with.
            remake: a function that makes the call, and its arguments, for `bench.peak_memory`; without it, no
                peak is measured on a CPU.
            profiled: whether to keep the time of each kernel in a call on a GPU.
            **facts: further fields of `Record`.
        """
        if "peak_bytes" not in facts:
            facts["peak_bytes"] = self._peak_bytes(call, remake)
        if profiled:
            facts |= profile_call(call, self.device)
        self.benchmark.group = group
        return self.record(self._time(call), group=group, case=case, run=run, dtype=dtype, **facts)

    def record(
        self, timing: Timing, *, group: str, case: Any, run: str, dtype: torch.dtype, **facts: Any
    ) -> Record:
        """Record the measurements, with the device's best rates in the same run."""
        record = Record(
            id=self.id,
            group=group,
            case=str(case),
            run=run,
            median=timing.median,
            p20=timing.p20,
            p80=timing.p80,
            rounds=timing.rounds,
            device=device_name(self.device),
            matmul_rate=matmul_rate(self.device, dtype),
            copy_bandwidth=copy_bandwidth(self.device),
            versions=versions(),
            commit=commit(),
            **facts,
        )
        self.benchmark.extra_info["record"] = vars(record)
        if self.path is not None:
            records.append(self.path, record)
        self.add_row(group, cells(record))
        return record

    def _peak_bytes(self, call: Callable[[], Any], remake: Sequence[Any]) -> int | None:
        if self.device.type == "cuda":
            return peak_bytes(call, self.device)
        peak = peak_memory.measure(*remake) if remake else None
        return None if peak is None else peak.bytes

    def _time(self, call: Callable[[], Any]) -> Timing:
        """Run pytest-benchmark, which times a few calls on the host; the record has the GPU's time."""
        once = clock(call, self.device)
        rounds = rounds_of(once, self.device)
        if self.device.type != "cuda":
            self.benchmark.pedantic(call, rounds=rounds)
            assert self.benchmark.stats is not None
            return Timing.of(self.benchmark.stats.stats.data)
        self.benchmark.pedantic(
            clock, args=(call, self.device), rounds=HOST_ROUNDS if rounds > HOST_ROUNDS else 1
        )
        return time_call(call, self.device, rounds)


@functools.cache
def commit() -> str:
    """Return the commit of this checkout, with "+" if files differ from it; empty outside a checkout.

    In a packed tree (`bench.pack`), a file holds it.
    """
    if COMMIT.exists():
        return COMMIT.read_text(encoding="utf-8").strip()
    command = ("git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*")
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()
