"""Prepared launches are bitwise equal to ordinary ones in random settings (`support.launch_equality`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def compare(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "support.launch_equality", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "settings", [pytest.param(3, id="few"), pytest.param(500, id="many", marks=pytest.mark.slow)]
)
def test_random_settings(settings: int) -> None:
    done = compare("--settings", str(settings))
    assert done.returncode == 0, done.stderr
    assert f"{settings} settings" in done.stdout


@pytest.mark.parametrize("fault", ["buffers overlap", "wrong grid"])
def test_a_fault_is_found(fault: str) -> None:
    done = compare("--settings", "2", "--seed", "1", "--fault", fault)
    assert done.returncode != 0
    assert "AssertionError: call" in done.stderr or "no ordinary launch had this grid" in done.stderr
