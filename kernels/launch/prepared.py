"""Launches that are prepared once and repeated on other tensors, without Triton's and PyTorch's dispatch.

`prepare` runs a function that launches kernels, and records the arguments of each launch: for every pointer,
its tensor and byte offset. A `Prepared` repeats the launches on other tensors of the same shapes, strides,
types and alignment. Buffers that live only inside the function share one allocation, in which buffers overlap
that are never needed at the same time.

On a GPU, the compiled kernels are called directly; in the interpreter, the same launches run on views of
tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from catseg_fast.kernels.launch.checks import INTERPRETED
from catseg_fast.kernels.launch.direct import DirectLaunch, with_base
from catseg_fast.kernels.launch.launcher import Launch, record

ALIGNMENT = 256  # bytes, of buffers in the shared allocation

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


@dataclass(frozen=True)
class _Place:
    """A tensor at byte `offset` of a buffer, which is an input, an output, or in the shared allocation."""

    buffer: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor as a view of a buffer of bytes."""
        size = self.dtype.itemsize
        typed = buffer[self.offset % size :]
        typed = typed[: len(typed) // size * size].view(self.dtype)
        return typed.as_strided(self.shape, self.stride, typed.storage_offset() + self.offset // size)


@dataclass(frozen=True)
class _Step:
    """A launch with its arguments in order, and the places of pointers and tensor descriptors by index."""

    launch: Launch
    values: list[Any]
    pointers: list[tuple[int, _Place]]
    descriptors: list[tuple[int, Any, _Place]]

    @property
    def places(self) -> list[_Place]:
        return [place for _, place in self.pointers] + [place for _, _, place in self.descriptors]

    def moved(self, numbers: dict[int, int], offsets: dict[int, int]) -> _Step:
        """Return the step with renumbered buffers, and offsets in them."""

        def move(place: _Place) -> _Place:
            offset = place.offset + offsets.get(place.buffer, 0)
            return _Place(numbers[place.buffer], offset, place.shape, place.stride, place.dtype)

        pointers = [(index, move(place)) for index, place in self.pointers]
        descriptors = [(index, value, move(place)) for index, value, place in self.descriptors]
        return _Step(self.launch, self.values, pointers, descriptors)


@dataclass
class _Notes(TorchDispatchMode):
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

    def note(self, launch: Launch) -> _Step:
        """Record a launch that has just run."""
        arguments = {**launch.arguments, **launch.constants}
        step = _Step(launch.without_arguments(), [], [], [])
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

    def place(self, x: Tensor) -> _Place | None:
        """Return the place of a tensor; None if it is a constant of the function."""
        buffer = self._owners.get(x.untyped_storage()._cdata)
        if buffer is None:
            return None
        offset = int(x.storage_offset()) * x.itemsize
        if buffer < len(self._starts):
            offset -= self._starts[buffer]
        return _Place(buffer, offset, tuple(x.shape), x.stride(), x.dtype)

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


class Prepared:
    """Launches that were prepared by `prepare`."""

    def __init__(self, notes: _Notes, steps: Sequence[_Step], result: Any) -> None:
        self._inputs, self.aliases = notes.given, notes.aliases
        self._is_tuple = isinstance(result, tuple)
        outputs = _tensors(result)
        self._outputs: list[tuple[torch.Size, torch.dtype]] = []
        self._results: list[int] = []  # buffers that are returned
        numbers = {buffer: buffer for buffer in range(len(self._inputs))}
        for x in outputs:
            place = notes.place(x) if isinstance(x, Tensor) else None
            if place is not None and place.buffer < len(self._inputs):
                if not any(given is x for given in notes.inputs):
                    raise NotPreparable("it returns a part of an input")
            elif place is None or place.buffer in numbers or place.offset or not x.is_contiguous():
                raise NotPreparable("it returns something other than contiguous tensors that it allocated")
            else:
                numbers[place.buffer] = len(numbers)
                self._outputs.append((x.shape, x.dtype))
            self._results.append(numbers[place.buffer])
        if not outputs:
            raise NotPreparable("it returns nothing")
        self._device: torch.device = outputs[0].device
        self.shared_bytes, offsets = _share(steps, notes.bytes, set(numbers))
        shared = len(numbers)
        numbers |= dict.fromkeys(offsets, shared)
        self._steps = [step.moved(numbers, offsets) for step in steps]
        self._launches = [_direct(step) for step in self._steps if step.launch.compiled is not None]

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Check whether inputs that were the same view are so again."""
        return all(inputs[index].data_ptr() == inputs[other].data_ptr() for index, other in self.aliases)

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Return the result for other inputs that fit, with the `signature` of the original ones."""
        device = self._device
        tensors: list[Any] = [inputs[index] for index in self._inputs]
        for shape, dtype in self._outputs:
            tensors.append(torch.empty(shape, dtype=dtype, device=device))
        if self.shared_bytes:
            tensors.append(torch.empty(self.shared_bytes, dtype=torch.uint8, device=device))
        if INTERPRETED:
            self._interpret([_bytes_of(x) for x in tensors])
        else:
            addresses, stream = [x.data_ptr() for x in tensors], _stream_of(device)
            for launch in self._launches:
                launch(addresses, stream)
        if self._is_tuple:
            return tuple([tensors[number] for number in self._results])
        return tensors[self._results[0]]

    def _interpret(self, buffers: list[Tensor]) -> None:
        for step in self._steps:
            values = step.values.copy()
            for index, place in step.pointers:
                values[index] = place.view(buffers[place.buffer])
            for index, descriptor, place in step.descriptors:
                values[index] = with_base(descriptor, place.view(buffers[place.buffer]))
            step.launch.kernel[step.launch.grid](*values, **step.launch.options)


def prepare(function: Callable[..., Any], *inputs: Tensor | None) -> tuple[Any, Prepared]:
    """Run `function(*inputs)`, and prepare its repetition.

    Args:
        function: launches kernels on its inputs, on buffers that it allocates, and on constant tensors such
            as weights. It computes nothing with PyTorch's own operations, and returns contiguous tensors that
            it allocated, or inputs that it writes to.
        inputs: tensors or None. Two of them share no memory, or are the same view.

    Returns:
        The function's result, and its repetition.

    Raises:
        NotPreparable: if the function does anything else.
    """
    notes = _Notes(inputs)
    with notes, record(note=notes.note) as steps:
        result = function(*inputs)
    try:
        if notes.computed:
            raise NotPreparable(f"it computes with {', '.join(dict.fromkeys(notes.computed))}")
        return result, Prepared(notes, steps, result)
    except NotPreparable as error:
        error.result = result
        raise


def signature(inputs: Sequence[Tensor | None]) -> tuple[object, ...]:
    """Return the properties of inputs that must be equal for prepared launches to be repeated."""
    return tuple(
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in inputs
    )


class PreparedCalls:
    """Functions that launch kernels, by key and signature: run, prepared, compared once, then repeated.

    If the result of a repetition differs by a bit from the function's own, it is dropped with a warning.

    Attributes:
        repeated: number of calls that were repetitions.
    """

    LIMIT = 256  # most keys

    def __init__(self) -> None:
        self._calls: dict[object, Prepared | None] = {}
        self._trusted: dict[object, Prepared] = {}
        self.repeated = 0

    def __call__(self, key: object, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """Return `function(*inputs)`.

        Args:
            key: identifies the function and everything that it depends on besides its inputs.
            function: as for `prepare`; returns at least one tensor.
            inputs: as for `prepare`.
        """
        key = (key, signature(inputs))
        prepared = self._trusted.get(key)
        if prepared is not None:
            if prepared.aliases and not prepared.fits(inputs):
                return function(*inputs)
            self.repeated += 1
            return prepared(*inputs)
        if key in self._calls and self._calls[key] is None:
            return function(*inputs)
        if _capturing(inputs):  # results cannot be compared now
            return function(*inputs)
        return self._learn(key, function, inputs)

    def _learn(self, key: object, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        if len(self._calls) >= self.LIMIT:
            self._calls.clear()
            self._trusted.clear()
        prepared = self._calls.get(key)
        if prepared is None:
            try:
                result, self._calls[key] = prepare(function, *inputs)
                return result
            except NotPreparable as error:
                self._calls[key] = None
                return function(*inputs) if error.result is None else error.result
        if not prepared.fits(inputs):
            return function(*inputs)
        try:
            before = [inputs[index].clone() for index, _ in prepared.aliases]  # which may be overwritten
        except torch.OutOfMemoryError:
            return function(*inputs)
        result = function(*inputs)
        expected: list[Tensor] = []
        try:
            expected += [x.clone() for x in _tensors(result)]  # the repetition may write to the same place
            for (index, _), x in zip(prepared.aliases, before, strict=True):
                inputs[index].copy_(x)
            same = _same_bits(expected, _tensors(prepared(*inputs)))
            reason = "another result"
        except torch.OutOfMemoryError:  # of the comparison, which has time; the result is there, and stays
            for x, right in zip(_tensors(result), expected, strict=False):
                x.copy_(right)
            return result
        except Exception as error:  # of many types, if Triton's interface has changed
            same, reason = False, str(error)
        if same:
            self._trusted[key] = prepared
            return result
        self._calls[key] = None
        warnings.warn(
            f"kernels are launched through Triton, which is slower: {reason}", RuntimeWarning, stacklevel=3
        )
        for x, right in zip(_tensors(result), expected, strict=True):
            x.copy_(right)
        return result


def _capturing(inputs: Sequence[Tensor | None]) -> bool:
    on_gpu = any(x is not None and x.is_cuda for x in inputs)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    pairs = ((a.contiguous(), b.contiguous()) for a, b in zip(first, second, strict=True))
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _tensors(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _stream_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def _direct(step: _Step) -> DirectLaunch:
    pointers = [(index, place.buffer, place.offset) for index, place in step.pointers]
    descriptors = [(index, value, place.buffer, place.offset) for index, value, place in step.descriptors]
    return DirectLaunch(step.launch.compiled, step.launch.grid, step.values, pointers, descriptors)


def _bytes_of(x: Tensor) -> Tensor:
    """Return the memory of a tensor from its first element on, as uint8."""
    whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    return whole[x.storage_offset() * x.itemsize :]


def _share(steps: Sequence[_Step], sizes: Sequence[int], apart: set[int]) -> tuple[int, dict[int, int]]:
    """Lay out buffers in one allocation, the largest first, without overlap of those that live together.

    Args:
        steps: launches in order.
        sizes: bytes of each buffer.
        apart: buffers outside the allocation.

    Returns:
        The size of the allocation in bytes, and the first byte of each buffer.
    """
    lives: dict[int, tuple[int, int]] = {}
    for number, step in enumerate(steps):
        for place in step.places:
            if place.buffer not in apart:
                first, _ = lives.get(place.buffer, (number, number))
                lives[place.buffer] = (first, number)
    starts: dict[int, int] = {}
    for buffer in sorted(lives, key=lambda buffer: -sizes[buffer]):
        first, last = lives[buffer]
        start = 0
        for begin, end in sorted(
            (starts[other], starts[other] + sizes[other])
            for other in starts
            if lives[other][0] <= last and first <= lives[other][1]
        ):
            if start + sizes[buffer] <= begin:
                break
            start = max(start, -(-end // ALIGNMENT) * ALIGNMENT)
        starts[buffer] = start
    return max((start + sizes[buffer] for buffer, start in starts.items()), default=0), starts
