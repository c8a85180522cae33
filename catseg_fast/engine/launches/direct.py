"""A compiled kernel's launch without Triton's dispatch: the one place that knows how Triton's versions do it.

`JITFunction.run` calls the compiled kernel's `run`, Triton's launcher in Python, which looks for scratch
memory and calls the launcher in C. In versions that are known, and for kernels that take no scratch memory,
the one in C is called at once; else the one in Python is. Hooks are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import FunctionType
from typing import Any

from torch import Tensor
from triton.backends.nvidia import driver as nvidia

from catseg_fast.kernels.launch.checks import TRITON

# Versions by how the launcher in C takes the kernel's arguments: one by one, or in a list.
SPREADING = ((3, 6),)
PACKING = ((3, 7), (3, 8))

MOST_PLACES = 32  # sets of addresses for which the arguments of a launch are kept

Start = Callable[..., Any]
Bound = tuple[Start, tuple[Any, ...]]
Expand = Callable[..., tuple[Any, ...]]


class DirectLaunch:
    """A launch whose arguments are made once, except for addresses and the stream.

    Args:
        compiled: Triton's compiled kernel.
        grid: programs along each axis.
        values: its arguments in order; what addresses replace is None.
        pointers: (argument, buffer, byte): the address of a byte of a buffer takes an argument's place.
        descriptors: (argument, descriptor, buffer, byte): the same for a tensor descriptor's base.
    """

    def __init__(
        self,
        compiled: Any,
        grid: Sequence[int],
        values: Sequence[Any],
        pointers: Sequence[tuple[int, int, int]],
        descriptors: Sequence[tuple[int, Any, int, int]],
    ) -> None:
        self._alive = list(values)  # weights, of which only the addresses are passed
        self._values = [x.data_ptr() if isinstance(x, Tensor) else x for x in values]
        self._pointers, self._descriptors = pointers, descriptors
        x, y, z = (*grid, *(1,) * (3 - len(grid)))
        self._grid = (x, y, z)
        self._launcher = _Launcher.of(compiled)
        used = [buffer for _, buffer, _ in pointers] + [buffer for _, _, buffer, _ in descriptors]
        self._own = itemgetter(0, 0, *[1 + buffer for buffer in dict.fromkeys(used)])
        self._bound: dict[tuple[int, ...], Bound] = {}

    def bind(self, place: tuple[int, ...]) -> Bound:
        """Return a function and its arguments that launch the kernel.

        They can be used any number of times, by several threads at once.

        Args:
            place: the stream, and the address of each buffer.
        """
        own = self._own(place)
        return self._bound.get(own) or self._make(own, place)

    def _make(self, own: tuple[int, ...], place: tuple[int, ...]) -> Bound:
        stream, *addresses = place
        values = self._values.copy()
        for index, buffer, offset in self._pointers:
            values[index] = addresses[buffer] + offset
        for index, descriptor, buffer, offset in self._descriptors:
            values[index] = with_base(descriptor, _Address(addresses[buffer] + offset))
        launcher = self._launcher
        if launcher.packed:
            arguments = (*self._grid, stream, *launcher.settings, values)
        else:
            arguments = (*self._grid, stream, *launcher.settings, *values)
        if launcher.expand is not None:
            arguments = launcher.expand(*arguments)
        if len(self._bound) >= MOST_PLACES:
            self._bound.clear()
        bound = self._bound[own] = (launcher.start, arguments)
        return bound


@dataclass(frozen=True)
class _Launcher:
    """A function that launches a kernel.

    Attributes:
        start: takes the grid, the stream, `settings`, and the kernel's arguments.
        packed: whether these are one list.
        expand: replaces tensor descriptors in arguments for `start` by what the kernel takes for them, which
            takes longer than a launch; None if `start` does it.
    """

    start: Start
    settings: tuple[Any, ...]
    packed: bool
    expand: Expand | None = None

    @classmethod
    def of(cls, compiled: Any) -> _Launcher:
        """Return the shortest known way to launch a compiled kernel."""
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        scratch = (getattr(run, name, 1) for name in ("global_scratch_size", "profile_scratch_size"))
        if TRITON not in SPREADING + PACKING or any(scratch) or getattr(run, "gsan_enabled", False):
            return cls(run, (function, metadata, None, None, None), packed=False)
        start, expand = _without_descriptors(compiled)
        kind = (function, run.launch_cooperative_grid, run.launch_pdl)
        if TRITON in SPREADING:
            return cls(start, (*kind, None, None, metadata, None, None, None), False, expand)
        annotated = (run.arg_annotations, run.kernel_signature)
        return cls(start, (*kind, metadata, *(None,) * 5, *annotated), True, expand)


def _without_descriptors(compiled: Any) -> tuple[Start, Expand | None]:
    """Return the launcher in C, and the function that replaces tensor descriptors in its arguments.

    Triton calls both in one function, in which the launcher in C is a variable.
    """
    launch = compiled.run.launch
    if not isinstance(launch, FunctionType) or "launcher" not in launch.__code__.co_freevars:
        return launch, None
    start = inspect.getclosurevars(launch).nonlocals["launcher"]
    maps = getattr(compiled.metadata, "tensordesc_meta", None)
    expand = nvidia.wrap_handle_tensordesc(lambda *arguments: arguments, dict(compiled.src.signature), maps)
    return start, expand


@dataclass(frozen=True)
class _Address:
    """Stands in for a tensor of which only the address counts."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def with_base(descriptor: Any, base: Any) -> Any:
    """Return a copy of a tensor descriptor on another base, which is not checked again."""
    copy = object.__new__(type(descriptor))
    copy.__dict__.update(descriptor.__dict__, base=base)
    return copy
