"""Every kernel compiles for every supported GPU, and takes no more of it than it says (`support/aot.py`)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from catseg_fast.kernels.launch.compile_target import CAPABILITIES, CompileTarget
from support import aot

MODULES = aot.modules()
# On sm_89 the compiler makes of every target what it makes on sm_86.
CHIPS = [pytest.param(x, marks=pytest.mark.slow if x == 89 else ()) for x in CAPABILITIES]
TARGETS = [
    pytest.param(module, capability, target, id=aot.key(module, capability, target), marks=marks)
    for module in MODULES
    for (capability,), marks, _ in CHIPS
    for target in aot.targets(module, capability)
]
pytestmark = pytest.mark.xdist_group("aot")  # one process has what is compiled

GOOD = aot.Resources(128, 0, 0, 0, 1024, "wgmma", 4)
TARGET = CompileTarget("example", None, {}, {}, num_warps=4, num_stages=2, expects_mma="wgmma")
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
    """Resources by `aot.key`, of the modules and capabilities of the selected tests."""
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    needed = [call.params for call in calls if call and "module" in call.params]
    return aot.resources_of(
        *(sorted({params[name] for params in needed}) for name in ("module", "capability"))
    )


@pytest.mark.parametrize(("module", "capability", "target"), TARGETS)
def test_takes_no_more_than_it_says(
    module: str, capability: int, target: CompileTarget, compiled: dict[str, aot.Resources | str]
) -> None:
    taken = compiled[aot.key(module, capability, target)]
    assert not aot.faults(target, capability, taken)


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("module", MODULES)
def test_takes_what_was_recorded(
    module: str, capability: int, compiled: dict[str, aot.Resources | str]
) -> None:
    """A change that costs registers is to be seen in review: `tests/support/aot.py --write` records it."""
    record = aot.recorded()
    if record is None:
        pytest.skip(f"nothing is recorded of triton {aot.triton.__version__}")

    def chosen(by_name: dict[str, Any]) -> dict[str, Any]:
        start, end = f"{module} / ", f" / sm_{capability}"
        return {name: x for name, x in by_name.items() if name.startswith(start) and name.endswith(end)}

    found = {name: x if isinstance(x, str) else asdict(x) for name, x in chosen(compiled).items()}
    print(aot.table(found))
    assert found == chosen(record)


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
    assert not aot.faults(TARGET, 90, GOOD)
    (found,) = aot.faults(TARGET, 90, taken)
    assert fault in found


def test_counts_spills_in_loops_apart() -> None:
    assert aot.count_spills(LOOP) == (3, 1)
