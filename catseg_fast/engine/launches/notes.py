"""Notes of what a function does that launches kernels: its allocations, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from catseg_fast.engine.launches.direct import with_base
from catseg_fast.engine.launches.places import Place, Step
from catseg_fast.kernels.launch.launcher import Launch

# Operations of PyTorch that compute nothing.
_ALLOCATIONS = {"empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like"}
_VIEWS = {
    "detach", "alias", "view", "_unsafe_view", "_reshape_alias", "expand", "slice", "select", "as_strided",
    "permute", "transpose", "t", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind",
}  # fmt: skip


class NotPreparable(Exception):
    """The function does more than launch kernels; the message says what.

    Attributes:
        result: of the function, if it has run: it must not run again, as it may have written to its inputs.
    """

    result: Any = None


@dataclass
class Notes(TorchDispatchMode):
    """Records the allocations and launches of a function, without keeping its buffers alive.

    Buffers are numbered in the order of their allocation, after the inputs. Storages are identified by their
    current owner, since an address is reused once its memory is freed.
    """

    inputs: Sequence[Tensor | None]
    computed: list[str] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._owners: dict[int, int] = {}
        self._starts: list[int] = []  # first byte of each input in its storage
        self.given: list[int] = []  # inputs, by buffer
        self.aliases: list[tuple[int, int]] = []  # inputs that are an earlier one once more
        for index, x in enumerate(self.inputs):
            if x is None:
                continue
            earlier = self._owners.get(x.untyped_storage()._cdata)
            if earlier is None:
                self._own(x)
                self.given.append(index)
                self._starts.append(int(x.storage_offset()) * x.itemsize)
            else:
                self._alias(self.given[earlier], index)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.rpartition("::")[2]
        out = op(*args, **(kwargs or {}))
        if name in _ALLOCATIONS:
            self._own(out)
        elif name not in _VIEWS:
            self.computed.append(name)
        return out

    def note(self, launch: Launch) -> Step:
        """Record a launch that has just run."""
        arguments = {**launch.arguments, **launch.constants}
        step = Step(launch.without_arguments(), [], [], [])
        for index, name in enumerate(launch.kernel.arg_names):
            value = arguments[name]
            is_tensor = isinstance(value, Tensor)
            x = value if is_tensor else getattr(value, "base", None)
            place = self.place(x) if isinstance(x, Tensor) else None
            if place is not None and is_tensor:
                step.pointers.append((index, place))
            elif place is not None:
                step.descriptors.append((index, with_base(value, None), place))
            step.values.append(value if place is None else None)
        return step

    def place(self, x: Tensor) -> Place | None:
        """Return the place of a tensor; None if it is a constant of the function."""
        buffer = self._owners.get(x.untyped_storage()._cdata)
        if buffer is None:
            return None
        offset = int(x.storage_offset()) * x.itemsize
        if buffer < len(self._starts):
            offset -= self._starts[buffer]
        return Place(buffer, offset, tuple(x.shape), x.stride(), x.dtype)

    def _alias(self, earlier: int, index: int) -> None:
        x, other = self.inputs[earlier], self.inputs[index]
        assert x is not None
        assert other is not None
        if (x.data_ptr(), x.shape, x.stride(), x.dtype) != (
            other.data_ptr(), other.shape, other.stride(), other.dtype,
        ):  # fmt: skip
            raise NotPreparable("two inputs share memory")
        self.aliases.append((earlier, index))

    def _own(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self._owners[storage._cdata] = len(self.bytes)
        self.bytes.append(storage.nbytes())
