"""Work that a call gives to a GPU, and the host's time for it, on a fake GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# By classes and best classes, for five crops: the most launches, copies and fills of a call.
CASES = {(150, None): 60, (1203, None): 220, (847, 256): 180}
pytestmark = pytest.mark.xdist_group("host")  # one process counts


def run(*options: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    cases = [f"{classes}:{best or 0}" for classes, best in CASES]
    return json.loads(run("-m", "bench.fake_gpu", "--cases", *cases).splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("classes", "best"), CASES)
def test_a_call_orders_no_more_than_that(found: dict[str, Any], classes: int, best: int | None) -> None:
    orders = found[f"{classes}:{best or 0}"]
    print(orders)
    assert sum(orders["kernels"].values()) >= 20  # the kernels did run
    assert orders["total"] <= CASES[classes, best]


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler")
def test_triton_launches_as_often_through_its_own_launchers(found: dict[str, Any]) -> None:
    """Launches of the benchmark of the host's time, down to the CUDA library."""
    program = (
        "import torch; from bench import bench_host as b\n"
        "with b.fake_launches() as library, b.cheap_operations(), torch.no_grad():\n"
        "    print([b.measure_call(classes, library, 2)['launches'] for classes in (150, 1203)])"
    )
    expected = [sum(found[case]["kernels"].values()) for case in ("150:0", "1203:0")]
    assert run("-c", program).splitlines()[-1] == str(expected)


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler")
def test_the_driver_gets_what_triton_would_hand_it() -> None:
    """Prepared launches call Triton's launcher in C, with descriptors that are made once per address."""
    launches, descriptors = map(int, re.findall(r"\d+", run("-m", "support.launch_arguments")))
    assert launches >= 4 * 20
    assert descriptors >= 4


def test_launches_are_repeated(found: dict[str, Any]) -> None:
    """Launches bypass the dispatch of PyTorch and Triton from the third equal chunk on."""
    for orders in found.values():
        assert orders["repeated"] > 0
