"""Work that a call gives to a GPU, and the host's time for it, on a GPU that does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# By classes and best classes, of five crops: the most launches, copies and fills that a call may order.
CASES = {(150, None): 60, (1203, None): 220, (847, 256): 180}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    cases = [f"{classes}:{best or 0}" for classes, best in CASES]
    command = [sys.executable, "-m", "bench.fake_gpu", "--cases", *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("classes", "best"), CASES)
def test_a_call_orders_no_more_than_that(found: dict[str, Any], classes: int, best: int | None) -> None:
    orders = found[f"{classes}:{best or 0}"]
    print(orders)
    assert sum(orders["kernels"].values()) >= 20  # the kernels did run
    assert orders["total"] <= CASES[classes, best]


def test_launches_are_repeated(found: dict[str, Any]) -> None:
    """Launches bypass the dispatch of PyTorch and Triton from the third equal chunk on."""
    for orders in found.values():
        assert orders["repeated"] > 0
