"""What chunks of classes are between two passes of the engine."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from catseg_fast.engine.folding import Plan
from catseg_fast.engine.terms import ImageTerms


class State(Protocol):
    """The chunks' `[B, t, HW, C]`, by slices of crops and classes."""

    def load(self, crops: slice, classes: slice) -> Tensor:
        """What was saved for these crops and classes."""

    def save(self, classes: slice, x: Tensor) -> None:
        """Keep a chunk of all crops."""


def new_state(policy: str, plan: Plan, image: ImageTerms, classes: int, chunk: int) -> State | None:
    """The state that a memory policy keeps for T classes; None where chunks are computed again."""
    if torch.compiler.is_compiling() and policy == "resident" and chunk >= classes:
        return SingleState()
    if policy == "recompute" or not plan.layers:
        return None
    shape = (image.crops, classes, image.features.shape[1], plan.channels)
    return (
        OffloadedState(shape, image.features) if policy == "offload" else ResidentState(shape, image.features)
    )


class ResidentState:
    """One tensor `[B, T, HW, C]` beside the features, updated in place; one chunk of all classes is it."""

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
        """Return where a chunk of all crops can be written instead of being saved."""
        if self._tensor is None:
            self._tensor = self._like.new_empty(self._shape)
        return self._tensor[:, classes]


class SingleState:
    """The one chunk that holds all classes, as it is: a graph has no copies, and no symbols as keys."""

    def load(self, crops: slice, classes: slice) -> Tensor:
        return self.chunk[crops, classes]

    def save(self, classes: slice, x: Tensor) -> None:
        self.chunk = x


class OffloadedState:
    """One tensor `[B, T, HW, C]` in host memory, pinned where there is a GPU.

    Copies run on streams of their own, beside the computation: while a chunk is worked on, the one behind it
    comes in and the one before it goes out. The host waits for neither. Buffers are allocated and freed on
    the current stream, which waits for a copy before it frees what the copy reads or writes.
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
        self._current.wait_stream(self._out)  # for what went out before
        self._out.wait_stream(self._current)
        self._going = x
        with self._module.stream(self._out):
            for crop, chunk in zip(self.tensor, x, strict=True):
                crop[classes].copy_(chunk, non_blocking=True)

    def _fetch(self, crops: slice, classes: slice) -> None:
        """Let a chunk come in, behind what the current stream has been given so far."""
        source = self.tensor[crops, classes]
        x = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        self._in.wait_stream(self._current)
        with self._module.stream(self._in):
            for crop, chunk in zip(x, source, strict=True):
                crop.copy_(chunk, non_blocking=True)
        self._fetched = (crops, classes, x)

    def _release(self) -> None:
        """Let all copies end before their buffers are freed, and before what they write is read."""
        self._current.wait_stream(self._in)
        self._current.wait_stream(self._out)
        self._fetched = self._going = None

    @property
    def _current(self) -> Any:
        return self._module.current_stream()
