"""Every kernel compiles for every supported GPU, and takes no more of it than it says (`support/aot.py`)."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

import pytest

from catseg_fast.kernels.launch.compile_target import CAPABILITIES, CompileTarget
from support import aot

TARGETS = [
    pytest.param(module, capability, target, id=aot.key(module, capability, target))
    for module in aot.modules()
    for capability in CAPABILITIES
    for target in aot.targets(module, capability)
]
compiled = functools.cache(aot.resources_of)
pytestmark = pytest.mark.xdist_group("aot")  # the cache is of one process

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


@pytest.mark.parametrize(("module", "capability", "target"), TARGETS)
def test_takes_no_more_than_it_says(module: str, capability: int, target: CompileTarget) -> None:
    taken = compiled(module)[aot.key(module, capability, target)]
    assert not aot.faults(target, capability, taken)


@pytest.mark.parametrize("module", aot.modules())
def test_takes_what_was_recorded(module: str) -> None:
    """A change that costs registers is to be seen in review: `tests/support/aot.py --write` records it."""
    record = aot.recorded()
    if record is None:
        pytest.skip(f"nothing is recorded of triton {aot.triton.__version__}")
    resources = {name: x if isinstance(x, str) else asdict(x) for name, x in compiled(module).items()}
    print(aot.table(resources))
    assert resources == {name: x for name, x in record.items() if name.startswith(f"{module} / ")}


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
