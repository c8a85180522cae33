"""Records of benchmarks that were not run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from bench.measure import Timing
from bench.records import Record


def make_record(name: str, timing: Timing, **facts: object) -> Record:
    """Return a record of a kernel on an invented device; `facts` replace its fields."""
    known = {
        "group": "kernels", "case": "decode, t=2, B=1, fp32", "run": "torch", "device": "a device",
        "matmul_rate": 1e12, "copy_bandwidth": 1e11, "flop": 1e9, "least_bytes": 10**7,
    }  # fmt: skip
    return Record(id=name, **vars(timing), **{**known, **facts})


def write_benchmark_file(path: Path, found: list[Record]) -> Path:
    """Write records as pytest-benchmark does."""
    benchmarks = [{"name": record.id, "extra_info": {"record": asdict(record)}} for record in found]
    path.write_text(json.dumps({"benchmarks": [*benchmarks, {"name": "another", "extra_info": {}}]}))
    return path
