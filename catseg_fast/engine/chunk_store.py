"""Storage of the chunks' state between two passes of the engine."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from catseg_fast.engine.folding import Plan
from catseg_fast.engine.terms import ImageTerms


class State(Protocol):
    """The state `[B, t, HW, C]` of chunks, by slices of crops and classes."""

    def load(self, crops: slice, classes: slice) -> Tensor:
        """Return the saved state of these crops and classes."""

    def save(self, classes: slice, x: Tensor) -> None:
        """Save a chunk of all crops."""


def new_state(policy: str, plan: Plan, image: ImageTerms, classes: int, chunk: int) -> State | None:
    """Return the storage of a memory policy for T classes; None if chunks are recomputed."""
    if torch.compiler.is_compiling() and policy == "resident" and chunk >= classes:
        return SingleState()
    if policy == "recompute" or not plan.layers:
        return None
    shape = (image.crops, classes, image.features.shape[1], plan.channels)
    return (
        OffloadedState(shape, image.features) if policy == "offload" else ResidentState(shape, image.features)
    )


class ResidentState:
    """One tensor `[B, T, HW, C]` on the device, updated in place; a chunk of all classes replaces it."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self._shape, self._like = shape, like
        self._tensor: Tensor | None = None

    def load(self, crops: slice, classes: slice) -> Tensor:
        assert self._tensor is not None
        return self._tensor[crops, classes]

    def save(self, classes: slice, x: Tensor) -> None:
        if x.shape == self._shape:
            self._tensor = x
            return
        self.slot(classes)[:] = x

    def slot(self, classes: slice) -> Tensor:
        """Return the memory to which a chunk of all crops can be written instead of being saved."""
        if self._tensor is None:
            self._tensor = self._like.new_empty(self._shape)
        return self._tensor[:, classes]


class SingleState:
    """The only chunk, which holds all classes, for graphs: it needs no copies, and no symbols as keys."""

    def load(self, crops: slice, classes: slice) -> Tensor:
        return self.chunk[crops, classes]

    def save(self, classes: slice, x: Tensor) -> None:
        self.chunk = x


class OffloadedState:
    """One tensor `[B, T, HW, C]` in host memory, pinned if there is a GPU.

    Copies run on streams of their own, concurrently with the computation: while a chunk is computed, the next
    one is loaded and the previous one is saved. The host waits for neither. Buffers are allocated and freed
    on the current stream, which waits for a copy before it frees the copy's buffers.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.device = like.device
        self.tensor = torch.empty(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
        self._module = torch.get_device_module(like.device)
        self._in, self._out = self._module.Stream(), self._module.Stream()
        self._fetched: tuple[slice, slice, Tensor] | None = None
        self._going: Tensor | None = None

    def load(self, crops: slice, classes: slice) -> Tensor:
        if self._fetched is None or self._fetched[:2] != (crops, classes):
            self._release()
            self._fetch(crops, classes)
        assert self._fetched is not None
        x = self._fetched[2]
        self._current.wait_stream(self._in)
        self._fetched = None
        following = slice(classes.stop, min(2 * classes.stop - classes.start, self.tensor.shape[1]))
        if len(x) == len(self.tensor) and following.start < following.stop:
            self._fetch(crops, following)
        return x

    def save(self, classes: slice, x: Tensor) -> None:
        self._current.wait_stream(self._out)  # for chunks saved before
        self._out.wait_stream(self._current)
        self._going = x
        with self._module.stream(self._out):
            for crop, chunk in zip(self.tensor, x, strict=True):
                crop[classes].copy_(chunk, non_blocking=True)

    def _fetch(self, crops: slice, classes: slice) -> None:
        """Load a chunk, after all work that is already on the current stream."""
        source = self.tensor[crops, classes]
        x = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        self._in.wait_stream(self._current)
        with self._module.stream(self._in):
            for crop, chunk in zip(x, source, strict=True):
                crop.copy_(chunk, non_blocking=True)
        self._fetched = (crops, classes, x)

    def _release(self) -> None:
        """Wait for all copies before their buffers are freed and their results are read."""
        self._current.wait_stream(self._in)
        self._current.wait_stream(self._out)
        self._fetched = self._going = None

    @property
    def _current(self) -> Any:
        return self._module.current_stream()
