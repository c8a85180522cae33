"""The host's work for a call, before and after it was rebuilt, as a table of `bench/results/host.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.tables import markdown, three_digits


def host_table(folder: Path) -> str:
    """Return what `bench.bench_host` measured, as a table."""
    runs = json.loads((folder / "host.json").read_text(encoding="utf-8"))["runs"]
    columns = {name: _cells(measured) for name, measured in runs.items()}
    rows = next(iter(columns.values()))
    return markdown([{"": row, **{name: cells[row] for name, cells in columns.items()}} for row in rows])


def _cells(measured: dict[str, Any]) -> dict[str, str]:
    operations, segment = measured["operations"], measured["segment_milliseconds"]
    additions = [measured["launch_adds"][T]["stages"] for T in ("150", "1203")]
    calls = [measured["calls"][T]["milliseconds"] for T in ("150", "1203")]
    replayed = f"; replayed {three_digits(segment['replayed'])} ms" if "replayed" in segment else ""
    per_launch = "host's time per kernel launch in a call, in such additions, T=150 / T=1203"
    outside = "`CATSeg.segment` of a 480x640 array outside CLIP and the aggregator, with work on the picture"
    return {
        "CPU": measured["device"].removeprefix("CPU "),
        "time of an addition of two small tensors": f"{three_digits(measured['addition_microseconds'])} µs",
        "GPU operations of a call, T=150 / T=1203": f"{operations['150:0']} / {operations['1203:0']}",
        "the same, best 256 of 847": str(operations["847:256"]),
        per_launch: " / ".join(map(three_digits, additions)),
        "host's time of a call, T=150 / T=1203": f"{' / '.join(map(three_digits, calls))} ms",
        outside: f"{three_digits(segment['plain'])} ms{replayed}",
    }
