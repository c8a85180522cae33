"""The first results of a GPU, `bench/results/h200/*.json`, as records.

They come from separate scripts, not from the benchmarks: medians, least and greatest times in
milliseconds, peak memory in MiB, and profiles. Each file names its GPU, versions, commit and launch configs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.cases import CROPS, SELECTED, Case
from bench.flops import call_flop
from bench.records import Record

REFERENCE = "(a) reference, eager fp32"
ENGINE = "(e) engine, Triton"
GRAPH = "CUDA graph"
DEFAULT_CONFIGS = "default configs"
WAYS = {
    "reference": REFERENCE,
    "autocast": "(b) reference, TF32 and bf16 autocast",
    "compiled": "(c) reference, bf16, channels last, SDPA, compiled",
    "torch": "(d) engine, torch",
    "triton": ENGINE,
}
STEPS_CLASSES = 1203  # of the runs with several numbers of classes per step
SELECTION_CLASSES = 847
MODEL = "v2-vitl, T=150, 480x640, B=5, fp16"
PARTS = {"engine": "engine", "graph": f"engine, {GRAPH}"}  # otherwise the part's own name


def read(paths: Iterable[Path]) -> list[Record]:
    """Return the records of the files that are such results; other files are skipped."""
    return [record for path in paths if (content := _load(path)) for record in _File(path, content).records()]


def _load(path: Path) -> dict[str, Any] | None:
    if path.suffix != ".json":
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) and "gpu" in content else None


class _File:
    """The content of one file."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    def records(self) -> Iterator[Record]:
        """Yield the records of everything in the file."""
        for key, item in self.content.get("runs", {}).items():
            yield from self._run(key, item)
        for classes, item in self.content.get("chunks", {}).items():
            yield from self._step(int(classes), item)
        if "best256" in self.content:
            yield from self._selection()
        for key, item in self.content.get("model", {}).items():
            yield from self._model(key, item)

    def _run(self, key: str, item: dict[str, Any]) -> Iterator[Record]:
        match = re.fullmatch(r"(\S+) T=(\d+) B=(\d+) (\w+) (\w+)( chunk=(\d+))?", key)
        if match is None:
            raise ValueError(f"{self.path}: {key!r} is not the name of a run")
        case = Case(match[1], int(match[2]), int(match[3]), getattr(torch, match[4]))
        way, group = WAYS[match[5]], "aggregator" if match[6] else "scaling"
        text = f"{case}, {match[7]} classes per step" if match[6] else str(case)
        if not case.variant.startswith("v2"):
            group = "aggregator"
        yield self._record(key, item["time"], group, text, way, case, peak=item.get("peak_mib"), source=item)
        if "graph" in item:
            yield self._record(f"{key}, graph", item["graph"], group, text, f"{way}, {GRAPH}", case)

    def _step(self, classes: int, item: dict[str, Any]) -> Iterator[Record]:
        case = Case("v2-vitl", STEPS_CLASSES, CROPS, torch.float16)
        for name, way in (("eager", ENGINE), ("graph", f"{ENGINE}, {GRAPH}")):
            facts: dict[str, Any] = {"peak": item["peak"], "source": item} if name == "eager" else {}
            record = self._record(f"{classes} {name}", item[name], "steps", str(case), way, case, **facts)
            yield Record(**{**vars(record), "classes": classes})

    def _selection(self) -> Iterator[Record]:
        item, reference = self.content["best256"], self.content["best256_reference"]
        case = Case("v2-vitl", SELECTION_CLASSES, CROPS, torch.float16, SELECTED)
        fp32 = Case("v2-vitl", SELECTION_CLASSES, CROPS, max_classes=SELECTED)
        yield self._record("best256", item["time"], "aggregator", str(case), ENGINE, case, source=item)
        yield self._record("best256_reference", reference, "aggregator", str(fp32), REFERENCE, fp32)

    def _model(self, key: str, item: dict[str, Any]) -> Iterator[Record]:
        if key == "profile":  # is that of the first entry
            return
        part = key.removeprefix("v2-vitl ")
        group = "model" if part in PARTS else "model split"
        source = {"profile": self.content["model"]["profile"]} if part == "engine" else {}
        yield self._record(key, item, group, MODEL, PARTS.get(part, part), source=source)

    def _record(
        self,
        key: str,
        time: dict[str, float],
        group: str,
        text: str,
        run: str,
        case: Case | None = None,
        *,
        peak: float | None = None,
        source: dict[str, Any] | None = None,
    ) -> Record:
        content, profile = self.content, (source or {}).get("profile")
        is_ours, is_triton = not run.startswith(("(a)", "(b)", "(c)")), run.startswith(ENGINE)
        if is_triton and content.get("launch_configs") == "default":
            run = f"{run}, {DEFAULT_CONFIGS}"
        flop = None if case is None else call_flop(case)
        dtype = "float16" if case is None or case.dtype != torch.bfloat16 else "bfloat16"
        in_fp32 = case is not None and case.dtype == torch.float32
        matmul = None if in_fp32 else content.get(f"matmul_torch.{dtype}")
        copy = content.get("copy_TB/s")
        return Record(
            id=f"{self.path.name}: {key}",
            group=group,
            case=text,
            run=run,
            median=time["median"] / 1e3,
            p20=None,
            p80=None,
            rounds=None,
            device=content["gpu"],
            matmul_rate=None if matmul is None else matmul * 1e12,
            copy_bandwidth=None if copy is None else copy * 1e12,
            classes=None if case is None else case.classes,
            peak_bytes=None if peak is None else round(peak * 2**20),
            reference_flop=None if flop is None else flop[0],
            flop=None if flop is None else flop[1 if is_ours else 0],
            busy=profile and profile["busy_ms"] / 1e3,
            launches=profile and profile["launches"],
            kernels=[(name, ms / 1e3, calls) for name, ms, calls in profile["rows"]] if profile else [],
            versions={name: content[name] for name in ("torch", "triton", "python")},
            commit=content["commit"],
        )
