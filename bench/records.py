"""Results: one record per benchmark, as a line of JSON that is written when the benchmark ends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SLOWER = 0.05  # differences up to this are noise


@dataclass(frozen=True)
class Record:
    """Measurements of one benchmark.

    Attributes:
        id: pytest's name of the benchmark.
        group: group of the table: "aggregator", "scaling", "kernels", "model", …
        case: what was computed.
        run: what computed it.
        median, p20, p80: seconds; percentiles are None where they were not kept.
        rounds: calls that were timed; None where it was not kept.
        device: name of the device.
        matmul_rate: FLOP/s of a matrix product on the device in this run, in the type of the case.
        copy_bandwidth: bytes/s of a copy in this run. Both are None where they were not measured.
        classes: T, if it varies.
        error_ratio: largest error in units of plain torch's, from the gate.
        peak_bytes: above weights and inputs.
        reference_flop, flop: operations of the reference, and of what ran.
        least_bytes: inputs read and outputs written once.
        busy: seconds of a profiled call in which the GPU ran kernels.
        launches: kernels of that call.
        kernels: name, seconds and launches of its longest kernels, the longest first.
        note: what makes it incomparable with others.
        versions, commit: what ran.
    """

    id: str
    group: str
    case: str
    run: str
    median: float
    p20: float | None
    p80: float | None
    rounds: int | None
    device: str
    matmul_rate: float | None
    copy_bandwidth: float | None
    classes: int | None = None
    error_ratio: float | None = None
    peak_bytes: int | None = None
    reference_flop: float | None = None
    flop: float | None = None
    least_bytes: int | None = None
    busy: float | None = None
    launches: int | None = None
    kernels: list[tuple[str, float, int]] = field(default_factory=list)
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""

    @property
    def rate(self) -> float | None:
        """FLOP/s."""
        return None if self.flop is None else self.flop / self.median

    @property
    def matmul_share(self) -> float | None:
        """Share of the device's matmul rate."""
        return None if self.rate is None or self.matmul_rate is None else self.rate / self.matmul_rate

    @property
    def copy_share(self) -> float | None:
        """Share of the device's copy bandwidth, counting inputs and outputs only."""
        if self.least_bytes is None or self.copy_bandwidth is None:
            return None
        return self.least_bytes / self.median / self.copy_bandwidth


def append(path: Path, record: Record) -> None:
    """Add a record to a file of lines, in place of a last line that was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(asdict(record)).encode() + b"\n")


def read(paths: Iterable[Path]) -> list[Record]:
    """Read records from pytest-benchmark's files (`.json`) and from files of lines (`.jsonl`).

    The last record of each id and device is returned. Files without records, and a last line that was cut
    short, are skipped.
    """
    found: dict[tuple[str, str], Record] = {}
    for path in paths:
        for item in _items(path):
            kernels = [tuple(kernel) for kernel in item.get("kernels", ())]
            record = Record(**{**item, "kernels": kernels})
            found[record.device, record.id] = record
    return list(found.values())


def _items(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]
    content = json.loads(text)
    benchmarks = content.get("benchmarks", []) if isinstance(content, dict) else []
    records = (benchmark.get("extra_info", {}).get("record") for benchmark in benchmarks)
    return [record for record in records if record is not None]


@dataclass(frozen=True)
class Change:
    """One benchmark in two files."""

    old: Record
    new: Record

    @property
    def relative(self) -> float:
        """Change of the median: 0.1 is 10 % slower."""
        return self.new.median / self.old.median - 1

    @property
    def slower(self) -> bool:
        """True if it is slower by more than noise."""
        return self.relative > SLOWER


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Return the benchmarks in both, the largest slow-down first.

    Raises:
        ValueError: if they have none in common, or were measured on different devices.
    """
    before = {record.id: record for record in old}
    changes = [Change(before[record.id], record) for record in new if record.id in before]
    if not changes:
        raise ValueError("the files have no benchmark in common")
    for change in changes:
        if change.old.device != change.new.device:
            raise ValueError(
                f"{change.new.id}: measured on {change.old.device!r}, then on {change.new.device!r}"
            )
    return sorted(changes, key=lambda change: -change.relative)


def missing(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """Return the names that the new results lack, for example because they did not pass the gate."""
    found = {record.id for record in new}
    return [record.id for record in old if record.id not in found]
