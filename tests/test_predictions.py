"""Predictions in BENCHMARKS.md follow from their records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import predictions, traffic
from bench.documents import RESULTS
from catseg_fast.kernels.launch.launcher import Launch

PROTOTYPES = predictions.read_prototypes(RESULTS)


@pytest.mark.parametrize(
    ("classes", "measured"),
    [(150, 10.8), (847, 58.7), (1203, 83.0)],  # in a CUDA graph
)
def test_the_sum_of_the_kernels_is_what_a_graph_took(classes: int, measured: float) -> None:
    assert predictions.call_milliseconds(PROTOTYPES, "before", classes) == pytest.approx(measured, rel=0.07)


def test_roofline(tmp_path: Path) -> None:
    content = {
        "crops": 2,
        "mflop_per_class_crop": dict.fromkeys(traffic.OPS, 1e6),
        "kernels": {"10": {op: {"kernel": {"launches": 3, "bytes": 4 * 10**9}} for op in traffic.OPS}},
    }
    (tmp_path / "traffic.json").write_text(json.dumps(content))
    *_, decoder, total = traffic.roofline(tmp_path, 1e15, 1e12).splitlines()
    assert decoder == ("| 10 | decoder | 3 | 4.00 GB | 20.0 TFLOP | 4.00 ms | 20.0 ms | 20.0 ms |")
    assert total == "| 10 | all | 12 | 16.0 GB | 80.0 TFLOP | 16.0 ms | 80.0 ms | 80.0 ms |"


def test_bytes_of_a_launch() -> None:
    function = type("Function", (), {"__module__": "catseg_fast.kernels.decoder.group_norm", "__name__": ""})
    function.__name__ = "merge_kernel"
    kernel = type("Kernel", (), {"fn": function})
    given = {
        "norm_ptr": torch.empty(2, 3, dtype=torch.float16),
        "map_ptr": torch.empty(2, 12, 12, 4, dtype=torch.float16),
        "eps": 1e-5,
    }
    border = 12 * 12 - 10 * 10
    assert traffic.kernel_bytes(Launch(kernel, (1,), given, {}, {})) == (
        "decoder", "merge", 2 * (6 + 2 * border * 4)
    )  # fmt: skip
