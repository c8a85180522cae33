"""The tables of figures in README.md and BENCHMARKS.md, made from `bench/results/`.

    python -m bench.documents            fill in the tables
    python -m bench.documents --check    exit with 1 if a document has other figures than the results

A table goes between `<!-- table: NAME -->` and `<!-- end of table -->`. A dash means not measured.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import acceleration_tables, predictions, raw_runs, records, traffic
from bench.host_table import host_table
from bench.plots import profile_parts
from bench.raw_runs import DEFAULT_CONFIGS, ENGINE, GRAPH, MODEL, REFERENCE, WAYS
from bench.records import Record
from bench.tables import markdown, seconds, three_digits
from catseg_fast.files import write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "BENCHMARKS.md")
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
GAP = "-"
NAMES = {  # of ways to compute the aggregator, by run and type
    (REFERENCE, "fp32"): "upstream's way: the reference, eager fp32",
    (WAYS["autocast"], "bf16"): "the reference, bf16 autocast",
    (WAYS["compiled"], "bf16"): "the reference, bf16, channels last, SDPA, `torch.compile`",
    (WAYS["torch"], "fp16"): "engine in PyTorch, fp16",
    (f"{ENGINE}, {DEFAULT_CONFIGS}", "bf16"): "Triton kernels, bf16, default launch configs",
    (f"{ENGINE}, {DEFAULT_CONFIGS}", "fp16"): "Triton kernels, fp16, default launch configs",
    (f"{ENGINE}, {GRAPH}, {DEFAULT_CONFIGS}", "fp16"): "the same in a CUDA graph",
    (ENGINE, "fp16"): "Triton kernels, fp16, tuned launch configs",
    (f"{ENGINE}, {GRAPH}", "fp16"): "the same in a CUDA graph",
}
FRONT = [
    (REFERENCE, "fp32"),
    (WAYS["autocast"], "bf16"),
    (WAYS["compiled"], "bf16"),
    (f"{ENGINE}, {DEFAULT_CONFIGS}", "fp16"),
    (ENGINE, "fp16"),
    (f"{ENGINE}, {GRAPH}", "fp16"),
]


class Results:
    """The records of a folder of results."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder

    @functools.cached_property
    def gpu(self) -> list[Record]:
        """Records of the H200."""
        return raw_runs.read(sorted((self.folder / "h200").glob("*.json")))

    @functools.cached_property
    def cpu(self) -> list[Record]:
        """Records of the CPU."""
        return records.read(self.folder / f"{name}.jsonl" for name in ("cpu", "cpu-full"))

    def find(self, run: str, case: str) -> Record:
        """Return the record of a run of a case; on the CPU, of a case with one crop."""
        found = [r for r in (*self.gpu, *self.cpu) if (r.run, r.case) == (run, case) and r.group != "steps"]
        if not found:
            raise LookupError(f"{self.folder} has no record of {run!r}, {case!r}")
        return found[0]


def aggregator(results: Results, ways: Sequence[tuple[str, str]]) -> str:
    """Return time and peak memory of the aggregator on the GPU, by run and number of classes."""
    own = [record for record in results.gpu if record.group == "scaling"]
    columns = sorted({record.classes or 0 for record in own})
    rows = []
    for run, dtype in ways:
        found = {r.classes: r for r in own if r.run == run and (_dtype(r)) == dtype}
        cells = {f"T={T}": _time_and_memory(found[T]) if T in found else GAP for T in columns}
        rows.append({"": NAMES[run, dtype], **cells})
    return markdown(rows)


def steps(results: Results) -> str:
    """Return time, launches and peak memory by the number of classes per step."""
    own = [record for record in results.gpu if record.group == "steps"]
    rows = []
    for classes in sorted({record.classes or 0 for record in own}):
        plain, graph = (
            next(record for record in own if record.classes == classes and (GRAPH in record.run) == in_graph)
            for in_graph in (False, True)
        )
        rows.append(
            {
                "classes per step": str(classes),
                "plain call": seconds(plain.median),
                "CUDA graph": seconds(graph.median),
                "kernels run for": seconds(plain.busy or 0),
                "launches": str(plain.launches),
                "peak memory": _memory(plain),
            }
        )
    return markdown(rows)


def profile(results: Results) -> str:
    """Return a table of a plain call's time by kernel."""
    columns = {f"T={T}": results.find(ENGINE, f"v2-vitl, T={T}, B=5, fp16") for T in (150, 1203)}
    parts = {name: profile_parts(record) for name, record in columns.items()}
    rows = [
        {"": part, **{name: f"{three_digits(1e3 * found[part])} ms" for name, found in parts.items()}}
        for part in parts["T=150"]
    ]
    facts: dict[str, Callable[[Record], str]] = {
        "kernels' share of the matrix product's rate": lambda r: f"{busy_share(results, r):.0%}",
        "launches": lambda r: str(r.launches),
    }
    rows += [{"": name, **{T: of(record) for T, record in columns.items()}} for name, of in facts.items()]
    return markdown(rows)


def busy_share(results: Results, record: Record) -> float:
    """Return the share of the matrix product's rate that is reached while kernels run."""
    rate = next(r.matmul_rate for r in results.gpu if r.matmul_rate and _dtype(r) == _dtype(record))
    assert record.flop is not None
    assert record.busy is not None
    return record.flop / record.busy / rate


def other_gpu(results: Results) -> str:
    """Return other cases on the GPU."""
    best, v1 = "v2-vitl, T=847, B=5", "v1-vitl-swinb, T=150, B=5, fp16"
    rows = [
        ("best 256 of 847 classes, as upstream's v2 does: upstream's way", REFERENCE, f"{best}, best 256"),
        ("the same, Triton kernels, tuned", ENGINE, f"{best}, fp16, best 256"),
        ("v1-vitl-swinb, T=150, default launch configs", f"{ENGINE}, {DEFAULT_CONFIGS}", v1),
        ("the same in a CUDA graph", f"{ENGINE}, {GRAPH}, {DEFAULT_CONFIGS}", v1),
        ("whole model v2-vitl, T=150, label map of 480x640", "engine", MODEL),
        ("of which CLIP", "CLIP", MODEL),
        ("of which the aggregator", "aggregator", MODEL),
        ("the whole model in a CUDA graph", f"engine, {GRAPH}", MODEL),
    ]
    found = [(name, results.find(run, case)) for name, run, case in rows]
    return markdown(
        [
            {
                "case": name,
                "time": seconds(record.median),
                "kernels run for": seconds(record.busy) if record.busy else GAP,
                "launches": str(record.launches or GAP),
            }
            for name, record in found
        ]
    )


def cpu(results: Results) -> str:
    """Return reference and engine on the CPU, and how they compare."""
    rows = []
    classes = sorted({r.classes or 0 for r in results.cpu if r.group == "scaling"})
    for T in classes:
        own = {r.run: r for r in results.cpu if r.group == "scaling" and r.classes == T}
        theirs, ours = own[REFERENCE], own[WAYS["torch"]]
        assert theirs.peak_bytes is not None
        assert ours.peak_bytes is not None
        rows.append(
            {
                "classes": str(T),
                "reference": _cpu_time(theirs),
                "engine": _cpu_time(ours),
                "": f"{theirs.median / ours.median:.1f}x",
                "peak memory: reference": f"{theirs.peak_bytes / 2**20:,.0f} MiB",
                "peak memory: engine": f"{ours.peak_bytes / 2**20:,.0f} MiB",
                " ": f"{theirs.peak_bytes / ours.peak_bytes:.0f}x",
            }
        )
    return markdown(rows)


def other_cpu(results: Results) -> str:
    """Return other cases on the CPU."""
    whole = "v2-vitb, T=4, 480x640, B=1, fp32"
    cases = [
        ("v2-vitl, T=150, engine in bf16", "v2-vitl, T=150, B=1", "v2-vitl, T=150, B=1, bf16", WAYS["torch"]),
        ("v1-vitl-swinb (80 prompts), T=150", *2 * ["v1-vitl-swinb, T=150, B=1"], WAYS["torch"]),
        ("whole model v2-vitb, T=4, whole image", whole, whole, "engine"),
    ]
    rows = []
    for name, reference, case, run in cases:
        theirs, ours = results.find(REFERENCE, reference), results.find(run, case)
        ratio = f"{theirs.median / ours.median:.1f}x"
        row = {
            "other cases": name,
            "reference, fp32": _cpu_time(theirs),
            "engine": _cpu_time(ours),
            "": ratio,
        }
        rows.append(row)
    return markdown(rows)


def roofline(results: Results) -> str:
    """Return bytes and products of a call, with the rates that the GPU reached in fp16."""
    rates = next(r for r in results.gpu if r.matmul_rate and r.copy_bandwidth and _dtype(r) == "fp16")
    assert rates.matmul_rate is not None
    assert rates.copy_bandwidth is not None
    return traffic.roofline(results.folder, rates.matmul_rate, rates.copy_bandwidth)


TABLES: dict[str, Callable[[Results], str]] = {
    "h200": lambda results: aggregator(results, FRONT),
    "h200-all": lambda results: aggregator(results, list(NAMES)),
    "h200-steps": steps,
    "h200-profile": profile,
    "h200-other": other_gpu,
    "cpu": cpu,
    "cpu-other": other_cpu,
    "predicted": lambda results: predictions.bounds(results.folder),
    "host": lambda results: host_table(results.folder),
    "accelerate": lambda results: acceleration_tables.own_time(results.folder),
    "accelerate-derived": lambda results: acceleration_tables.derived(results.folder),
    "roofline": roofline,
    "predicted-kernels": lambda results: predictions.kernels(results.folder),
    "predicted-calls": lambda results: predictions.calls(results.folder),
}


def fill(text: str, results: Results) -> str:
    """Return a document with its tables filled in from the results.

    Raises:
        ValueError: if it has a table of an unknown name.
    """

    def replace(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"table: {match[2]!r} is not one of {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]](results)}\n{match[3]}"

    return BLOCK.sub(replace, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 1 if `--check` finds other figures than the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    results, outdated = Results(), []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        filled = fill(text, results)
        if filled != text:
            outdated.append(name)
            if not options.check:
                write_text(path, filled)
    for name in outdated:
        print(f"{name}: {'has other figures than bench/results' if options.check else 'filled in'}")
    return 1 if options.check and outdated else 0


def _dtype(record: Record) -> str:
    last = record.case.split(", ")[-1]
    return last if last in ("fp16", "bf16") else "fp32"


def _time_and_memory(record: Record) -> str:
    memory = f", {_memory(record)}" if record.peak_bytes is not None else ""
    return f"{seconds(record.median)}{memory}"


def _memory(record: Record) -> str:
    return f"{three_digits((record.peak_bytes or 0) / 2**30)} GiB"


def _cpu_time(record: Record) -> str:
    return f"{record.median:.2f} s" if record.median < 10 else f"{record.median:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
