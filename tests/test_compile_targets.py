"""Every kernel compiles for every supported GPU, within its limits of resources (`support/aot.py`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from catseg_fast.kernels import OPS
from catseg_fast.kernels.launch.capability import CAPABILITIES
from catseg_fast.kernels.launch.launcher import Launch
from support import aot

ROOT = Path(__file__).parents[1]
# On sm_89 the compiler's result for every target is that for sm_86.
CHIPS = [pytest.param(x, marks=pytest.mark.slow if x == 89 else ()) for x in CAPABILITIES]
TARGETS = [
    pytest.param(target, id=target.name, marks=marks)
    for op in OPS
    for (capability,), marks, _ in CHIPS
    for target in aot.targets(op, capability)
]
pytestmark = pytest.mark.xdist_group("aot")  # one process compiles

GOOD = aot.Resources(128, 0, 0, 0, 1024, "wgmma", 4)
TARGET = aot.Target("example", "example", 90, Launch(None, (1,), {}, {}, {}), mma="wgmma")
LOOP = """
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/               @P0 LDL.64 R2, [R1] ;
        /*0020*/              @!P1 BRA `(.L_x_0) ;
        /*0030*/                   LDL R3, [R1+0x4] ;
        /*0040*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, aot.Resources | str]:
    """Compile the ops and capabilities of the selected tests; return resources by name."""
    ops, capabilities = set[str](), set[int]()
    for item in request.session.items:
        if item.path == request.path and (call := getattr(item, "callspec", None)):
            target = call.params.get("target")
            ops |= {target.op if target else call.params.get("op")} - {None}
            capabilities |= {target.capability if target else call.params.get("capability")} - {None}
    return aot.resources_of(sorted(ops), sorted(capabilities))


@pytest.mark.parametrize("target", TARGETS)
def test_takes_no_more_than_it_says(target: aot.Target, compiled: dict[str, aot.Resources | str]) -> None:
    assert not aot.faults(target, compiled[target.name])


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("op", OPS)
def test_takes_what_was_recorded(op: str, capability: int, compiled: dict[str, aot.Resources | str]) -> None:
    """A change that costs registers must be visible in review: `tests/support/aot.py --write` records it."""
    record = aot.recorded()
    if record is None:
        pytest.skip(f"nothing is recorded of triton {aot.triton.__version__}")

    def chosen(by_name: dict[str, Any]) -> dict[str, Any]:
        start, end = f"{op} / ", f" / sm_{capability}"
        return {name: x for name, x in by_name.items() if name.startswith(start) and name.endswith(end)}

    resources = {name: x if isinstance(x, str) else asdict(x) for name, x in chosen(compiled).items()}
    print(aot.table(resources))
    assert resources == chosen(record)


def test_names_are_unique() -> None:
    names = [parameters.values[0].name for parameters in TARGETS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("taken", "fault"),
    [
        ("RuntimeError: ptxas", "does not compile"),
        (replace(GOOD, shared=227 * 1024 + 1), "shared memory"),
        (replace(GOOD, stack=8, spills=1), "stack"),
        (replace(GOOD, spills_in_loops=1), "in a loop"),
        (replace(GOOD, mma="mma"), "no wgmma"),
        (replace(GOOD, mma=""), "no wgmma"),
    ],
)
def test_finds_a_fault(taken: aot.Resources | str, fault: str) -> None:
    assert not aot.faults(TARGET, GOOD)
    (found,) = aot.faults(TARGET, taken)
    assert fault in found


def test_counts_spills_in_loops_apart() -> None:
    assert aot.count_spills(LOOP) == (3, 1)


def test_compiles_as_a_launch_does() -> None:
    """Tensor descriptors are passed; None and 1 are constants; multiples of 16 are marked, unless refused."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "support.launch_probe"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    signature, uses_tma = done.stdout.splitlines()
    found = dict(re.findall(r"%(\w+): ([^,]*)", signature))
    assert uses_tma == "True"
    assert "tensordesc" in found["x_desc"]
    assert not {"one", "nothing", "SIZE"} & set(found)
    marked = {name for name, kind in found.items() if "tt.divisibility = 16" in kind}
    assert marked == {"x_ptr", "out_ptr", "sixteen"}
    assert {"odd", "free"} < set(found)
