"""The main cases, the first of a campaign: `-k ours`, `-k upstream`, `-k compiled`, `-k best256`."""

from __future__ import annotations

import pytest
import torch

from bench.baselines import BASELINES, Baseline
from bench.bench_aggregator import measure
from bench.cases import CROPS, SELECTED, Case
from bench.meter import Meter

GPU = torch.cuda.is_available()
WAYS = ("reference", "autocast", "compiled", "max-autotune", "torch", "triton", "graph")  # as in BASELINES
BY_NAME = dict(zip(WAYS, BASELINES, strict=True))
CLASSES = (150, 1203, 847)  # by value


def _on_a_gpu() -> dict[str, list[tuple[Case, str]]]:
    ours = [Case("v2-vitl", classes, CROPS, torch.float16) for classes in CLASSES]
    return {
        "ours": [(case, run) for case in ours for run in ("triton", "graph")],
        "upstream": [
            *((Case("v2-vitl", classes, CROPS), "reference") for classes in CLASSES),
            (Case("v2-vitl", CLASSES[0], CROPS, torch.bfloat16), "autocast"),
        ],
        "compiled": [(Case("v2-vitl", CLASSES[0], CROPS, torch.bfloat16), "compiled")],
        "best256": [
            *((Case("v2-vitl", 847, CROPS, torch.float16, SELECTED), run) for run in ("triton", "graph")),
            (Case("v2-vitl", 847, CROPS, max_classes=SELECTED), "reference"),
        ],
    }


def _on_a_cpu() -> dict[str, list[tuple[Case, str]]]:
    """Return the same case with few classes, for a dry run."""
    case, bf16 = Case("v2-vitl", 4), Case("v2-vitl", 4, dtype=torch.bfloat16)
    best = Case("v2-vitb", 8, max_classes=4)
    return {
        "ours": [(case, "torch")],
        "upstream": [(case, "reference"), (bf16, "autocast")],
        "compiled": [(bf16, "compiled")],
        "best256": [(best, "torch"), (best, "reference")],
    }


@pytest.mark.parametrize(
    ("part", "case", "way"),
    [
        pytest.param(part, case, BY_NAME[run], id=f"{part}, {case}, {run}")
        for part, cases in (_on_a_gpu() if GPU else _on_a_cpu()).items()
        for case, run in cases
    ],
)
def bench_headline(meter: Meter, part: str, case: Case, way: Baseline) -> None:
    measure("aggregator" if part == "best256" else "scaling", meter, case, way)
