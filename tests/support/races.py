"""A detector of data races and of accesses out of bounds, in Triton's interpreter.

The interpreter runs the programs of a launch one after another, and every operation of a program on all
elements in order. On a GPU, programs run at the same time, and so do a program's threads, each on some of the
elements; `watch` records which program reads and writes which addresses, and reports what depends on an order
that a GPU does not guarantee:

* Two programs of a launch write to an address, or one reads what another writes. Only atomic operations may.
* A program reads what it has written, without a `tl.debug_barrier` in between. Triton adds barriers for
  shared memory, but not for global memory, and the element may be in another thread now.
* A program writes to an address that it has read before, without a barrier in between. This is safe if it is
  the same element of tensors of the same shape: its value is computed from what was read, so that the read is
  complete. If the value has moved to another thread since, it went through shared memory, behind a barrier of
  Triton's that waits for all reads of the tensor.
* Two elements of a store go to one address with different values.
* An address is outside of all the launch's arguments. Elements that are masked access nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton._C.libtriton import interpreter as native
from triton.runtime import interpreter

WRITES = "two programs write"
SAME_VALUE = "two programs write the same value"
READS = "a program reads what another one writes"
READ_AFTER_WRITE = "a program reads what it wrote, without a barrier"
WRITE_AFTER_READ = "a program writes to what it read, without a barrier"
ELEMENTS = "two elements of a store have one address and different values"
OUT_OF_BOUNDS = "out of bounds"

NOBODY, SEVERAL = -1, -2


class Hazard(NamedTuple):
    """Accesses whose result depends on the order in which a GPU runs them.

    Attributes:
        kind: one of the kinds above.
        kernel: the kernel's name.
        argument: the names of the arguments that hold the first such address; "" if none does.
        offset: its distance in bytes from the start of the argument, or if none holds it, the address.
        program: the number of the program that noticed it.
        count: how many such elements there are.
    """

    kind: str
    kernel: str
    argument: str
    offset: int
    program: int
    count: int


@contextmanager
def watch(order: Callable[[int], Any] = np.arange) -> Iterator[list[Hazard]]:
    """List the hazards of all launches, one per kind, kernel and argument.

    Args:
        order: returns the order in which the programs of a launch run, for their number.
    """
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    atomic, exchange = builder.create_atomic_rmw, builder.create_atomic_cas
    place = builder.set_grid_idx
    found: dict[tuple[str, str, str], Hazard] = {}
    current: list[_Launch] = []

    def watched_launch(self: Any, *arguments: Any, **options: Any) -> None:
        named = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
        current.append(_Launch(self.fn.__name__, named, found))
        try:
            launch(self, *arguments, **options)
        finally:
            current.pop()

    def watched_place(*indices: int) -> None:
        grid = builder.grid_dim
        orders = current[-1].order
        if orders is None:
            orders = current[-1].order = order(int(np.prod(grid)))
        program = int(orders[np.ravel_multi_index(indices, grid)])
        current[-1].begin(program)
        place(*map(int, np.unravel_index(program, grid)))

    def watched_load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        current[-1].read(pointers, mask)
        return load(pointers, mask, *rest, **options)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[-1].write(pointers, mask, value)
        return store(pointers, value, mask, *rest)

    def watched_atomic(kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[-1].write(pointers, mask, None)
        return atomic(kind, pointers, value, mask, *rest)

    def watched_exchange(pointers: Any, *rest: Any) -> Any:
        current[-1].write(pointers, None, None)
        return exchange(pointers, *rest)

    executor.__call__ = watched_launch
    builder.set_grid_idx = watched_place
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw, builder.create_atomic_cas = watched_atomic, watched_exchange
    builder.create_barrier = lambda: current[-1].wait()
    hazards: list[Hazard] = []
    try:
        yield hazards
    finally:
        executor.__call__ = launch
        for name in ("set_grid_idx", "create_masked_load", "create_masked_store"):
            delattr(builder, name)  # which uncovers the method of the class
        for name in ("create_atomic_rmw", "create_atomic_cas", "create_barrier"):
            delattr(builder, name)
        hazards += found.values()


class _Launch:
    """The memory of a launch's arguments, and who reads and writes each unit of it.

    A unit has the size of the smallest element; an element is one or several units.
    """

    def __init__(
        self, kernel: str, arguments: dict[str, Any], found: dict[tuple[str, str, str], Hazard]
    ) -> None:
        self.kernel, self.found = kernel, found
        self.order: Any = None
        bases = {name: getattr(value, "base", value) for name, value in arguments.items()}
        tensors = {name: x for name, x in bases.items() if isinstance(x, Tensor)}
        self.unit = min((x.itemsize for x in tensors.values()), default=1)
        self.names: list[list[str]] = []
        regions: list[list[int]] = []
        for name, (start, end) in sorted(((n, _extent(x)) for n, x in tensors.items()), key=lambda x: x[1]):
            if regions and start < regions[-1][1]:  # such as an output that is also the input
                regions[-1][1] = max(regions[-1][1], end)
                self.names[-1].append(name)
            else:
                regions.append([start, end])
                self.names.append([name])
        self.starts, self.ends = np.array(regions, np.uint64).reshape(-1, 2).T
        sizes = (self.ends - self.starts).astype(np.int64) // self.unit
        self.firsts = np.cumsum(sizes) - sizes
        count = int(sizes.sum())
        self.writer, self.reader = (np.full(count, NOBODY, np.int32) for _ in range(2))
        self.atomic = np.zeros(count, bool)
        self.written, self.was_read = (np.zeros(count, np.int32) for _ in range(2))  # when, in stretches
        self.element = np.zeros(count, np.int64)  # which read the unit
        self.shapes: dict[tuple[int, ...], int] = {}
        self.stretch = self.program = 0  # a stretch is the part of a program between two barriers

    def begin(self, program: int) -> None:
        """Go to another program."""
        self.program = program
        self.wait()

    def wait(self) -> None:
        """Pass a barrier."""
        self.stretch += 1

    def read(self, pointers: Any, mask: Any) -> None:
        """Note a load."""
        units, elements, _ = self._units(pointers, mask, None)
        self._report(READS, units[self._is_other(self.writer[units])])
        self._report(READ_AFTER_WRITE, units[self.written[units] == self.stretch])
        before, first = self.reader[units], self.was_read[units] != self.stretch
        self.reader[units] = np.where(self._is_other(before) | (before == SEVERAL), SEVERAL, self.program)
        same = first | (self.element[units] == elements)
        self.element[units] = np.where(same, elements, SEVERAL)
        mixed = units[
            self.element[units] != np.where(same, elements, SEVERAL)
        ]  # by two elements of this load
        self.element[mixed] = SEVERAL
        self.was_read[units] = self.stretch

    def write(self, pointers: Any, mask: Any, value: Any) -> None:
        """Note a store, or if it has no value, an atomic operation."""
        units, elements, changes = self._units(pointers, mask, value)
        writers, readers = self.writer[units], self.reader[units]
        others = self._is_other(writers)
        if value is None:
            self._report(WRITES, units[others & ~self.atomic[units]])
        else:
            self._report(WRITES, units[others & changes])
            self._report(SAME_VALUE, units[others & ~changes])
        self._report(READS, units[self._is_other(readers) | (readers == SEVERAL)])
        read_before = (self.was_read[units] == self.stretch) & (self.element[units] != elements)
        self._report(WRITE_AFTER_READ, units[read_before])
        self.writer[units], self.atomic[units] = self.program, value is None
        self.written[units] = self.stretch

    def _is_other(self, programs: Any) -> Any:
        return (programs >= 0) & (programs != self.program)

    def _units(self, pointers: Any, mask: Any, value: Any) -> tuple[Any, Any, Any]:
        """Return the units of all elements in bounds, their elements, and whether a value changes them."""
        addresses = np.asarray(pointers.data)
        chosen = np.ones(addresses.shape, bool)
        if mask is not None:
            chosen = np.broadcast_to(mask.data, addresses.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        elements = np.flatnonzero(chosen)
        places = addresses[chosen]
        region = np.searchsorted(self.starts, places, side="right") - 1
        inside = (region >= 0) & (places + np.uint64(size) <= self.ends[region])
        self._report(OUT_OF_BOUNDS, places[~inside], inside=False)
        places, region, elements = places[inside], region[inside], elements[inside]
        changes = np.zeros(0, bool)
        if value is not None:
            values = np.broadcast_to(value.data, addresses.shape)[chosen][inside]
            changes = self._changes(places, values)
        shape = self.shapes.setdefault(addresses.shape, len(self.shapes))
        units = self.firsts[region] + (places - self.starts[region]).astype(np.int64) // self.unit
        width = max(1, size // self.unit)
        units = (units[:, None] + np.arange(width)).ravel()
        return units, np.repeat(elements + (shape << 40), width), np.repeat(changes, width)

    def _changes(self, places: Any, values: Any) -> Any:
        """Check which elements in memory differ from those that are stored."""
        bits = np.dtype(f"u{values.itemsize}")
        values = np.ascontiguousarray(values).view(bits)
        order = np.lexsort((values, places))
        twice = (places[order][1:] == places[order][:-1]) & (values[order][1:] != values[order][:-1])
        if twice.any():
            region = np.searchsorted(self.starts, places, side="right") - 1
            units = self.firsts[region] + (places - self.starts[region]).astype(np.int64) // self.unit
            self._report(ELEMENTS, units[order][1:][twice])
        everything, zero = np.ones(places.shape, bool), np.zeros(places.shape, bits)
        return native.load(np.ascontiguousarray(places), everything, zero, bits) != values

    def _report(self, kind: str, units: Any, inside: bool = True) -> None:
        if not len(units):
            return
        if inside:
            region = int(np.searchsorted(self.firsts, units[0], side="right")) - 1
            name, offset = ", ".join(self.names[region]), int(units[0] - self.firsts[region]) * self.unit
        else:
            name, offset = "", int(units[0])
        key = (kind, self.kernel, name)
        hazard = self.found.get(key, Hazard(kind, self.kernel, name, offset, self.program, 0))
        self.found[key] = hazard._replace(count=hazard.count + len(units))


def _extent(x: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first element, and that after its last one."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize * (x.numel() > 0)
