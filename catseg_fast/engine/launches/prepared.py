"""Launches that are prepared once and repeated on other tensors, without Triton's and PyTorch's dispatch.

`prepare` runs a function that launches kernels, and records the arguments of each launch: for every pointer,
its tensor and byte offset. A `Prepared` repeats the launches on other tensors of the same shapes, strides,
types and alignment. Buffers that live only inside the function share one allocation, in which buffers overlap
that are never needed at the same time.

On a GPU, the compiled kernels are called directly; in the interpreter, the same launches run on views of
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from catseg_fast.engine.launches.direct import MOST_PLACES, Bound, DirectLaunch, with_base
from catseg_fast.engine.launches.notes import Notes, NotPreparable
from catseg_fast.engine.launches.places import Step
from catseg_fast.engine.launches.sharing import share
from catseg_fast.kernels.launch.checks import INTERPRETED
from catseg_fast.kernels.launch.launcher import record


class Prepared:
    """Launches that were prepared by `prepare`."""

    def __init__(self, notes: Notes, steps: Sequence[Step], result: Any) -> None:
        self._inputs, self.aliases = notes.given, notes.aliases
        self._is_tuple = isinstance(result, tuple)
        outputs = tensors_of(result)
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
        self.shared_bytes, offsets = share(steps, notes.bytes, set(numbers))
        shared = len(numbers)
        numbers |= dict.fromkeys(offsets, shared)
        self._steps = [step.moved(numbers, offsets) for step in steps]
        self._launches = [_direct(step) for step in self._steps if step.launch.compiled is not None]
        self._bound: dict[tuple[int, ...], list[Bound]] = {}

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
            place = (_stream_of(device), *[x.data_ptr() for x in tensors])
            for start, arguments in self._bound.get(place) or self._bind(place):
                start(*arguments)
        if self._is_tuple:
            return tuple([tensors[number] for number in self._results])
        return tensors[self._results[0]]

    def _bind(self, place: tuple[int, ...]) -> list[Bound]:
        """Return the launches on a stream and buffers at addresses, which an allocator uses again."""
        bound = [launch.bind(place) for launch in self._launches]
        if len(self._bound) >= MOST_PLACES:
            self._bound.clear()
        self._bound[place] = bound
        return bound

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
    notes = Notes(inputs)
    with notes, record(note=notes.note) as steps:
        result = function(*inputs)
    try:
        if notes.computed:
            raise NotPreparable(f"it computes with {', '.join(dict.fromkeys(notes.computed))}")
        return result, Prepared(notes, steps, result)
    except NotPreparable as error:
        error.result = result
        raise


def _stream_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def _direct(step: Step) -> DirectLaunch:
    pointers = [(index, place.buffer, place.offset) for index, place in step.pointers]
    descriptors = [(index, value, place.buffer, place.offset) for index, value, place in step.descriptors]
    return DirectLaunch(step.launch.compiled, step.launch.grid, step.values, pointers, descriptors)


def _bytes_of(x: Tensor) -> Tensor:
    """Return the memory of a tensor from its first element on, as uint8."""
    whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    return whole[x.storage_offset() * x.itemsize :]


def tensors_of(result: Any) -> tuple[Any, ...]:
    """Return the tensors of a function's result."""
    return result if isinstance(result, tuple) else (result,)
