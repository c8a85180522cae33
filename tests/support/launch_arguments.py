"""Comparison of what prepared launches pass to the CUDA driver with Triton's own launcher in Python.

    python -m support.launch_arguments

needs a C compiler, and a process in which Triton's interpreter is off.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from bench.bench_host import aggregator_call, cheap_operations
from bench.fake_driver import fake_launches
from catseg_fast.engine.launches.direct import _Address, with_base
from catseg_fast.engine.launches.prepared import Prepared

BYTES = 2**20


def read(library: ctypes.CDLL, buffer: ctypes.Array[ctypes.c_uint8]) -> bytes:
    """Return the log since the last call."""
    return bytes(buffer[: library.fake_log(buffer, BYTES)])


def compare(prepared: Prepared, library: ctypes.CDLL) -> tuple[int, int]:
    """Compare each launch, twice on each of several places; return the numbers of launches and descriptors.

    Raises:
        AssertionError: if a byte differs.
    """
    buffer, descriptors = (ctypes.c_uint8 * BYTES)(), 0
    count = 1 + max(place.buffer for step in prepared._steps for place in step.places)
    library.fake_log(buffer, BYTES)
    for round in range(4):
        stream, *addresses = place = (round % 2, *[(8 + 5 * n + round % 2) << 24 for n in range(count)])
        for step, launch in zip(prepared._steps, prepared._launches, strict=True):
            start, arguments = launch.bind(place)
            start(*arguments)
            actual = read(library, buffer)
            values: list[Any] = step.values.copy()
            for index, at in step.pointers:
                values[index] = addresses[at.buffer] + at.offset
            for index, descriptor, at in step.descriptors:
                values[index] = with_base(descriptor, _Address(addresses[at.buffer] + at.offset))
            grid, compiled = (*step.launch.grid, 1, 1)[:3], step.launch.compiled
            head = (*grid, stream, compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(*head, *values)
            expected = read(library, buffer)
            assert len(expected) > 48, "nothing was launched"
            assert actual == expected, f"{compiled.name}: the driver got other arguments"
            descriptors += len(step.descriptors)
    return 4 * len(prepared._launches), descriptors


def main() -> None:
    """The program."""
    torch.set_num_threads(1)
    with fake_launches() as library, cheap_operations(), torch.no_grad():
        call: Any = aggregator_call(150)
        for _ in range(4):
            call()
        (stages,) = call.func.engine._triton.values()
        found = [compare(prepared, library) for prepared in stages._calls._trusted.values()]
    launches, descriptors = map(sum, zip(*found, strict=True))
    print(f"{launches} launches with {descriptors} descriptors: equal")


if __name__ == "__main__":
    main()
