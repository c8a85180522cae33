"""Streaming over classes with gradients: activations are kept, or computed again in the backward pass.

A class's activations in one call take tens of megabytes. With checkpointing, a chunk of classes keeps only
its state between two layers, `[B, t, HW, C]` per layer; everything else is computed again, chunk by chunk, in
the backward pass. That costs one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from catseg_fast.engine.chunk_store import SingleState, State
from catseg_fast.engine.class_memory import ClassMemory
from catseg_fast.engine.streaming import Consumer, Stream


class GradientStream(Stream):
    """A call with gradients; the stages must be differentiable.

    A recomputed function must not refer to anything computed after it: Python does not find such a cycle,
    which passes through autograd, and its memory would never be freed.
    """

    def run(self, consume: Consumer) -> None:
        try:
            super().run(consume)
        finally:
            self.state, self.memories, self._slots = None, [], None

    def _new_state(self) -> State:
        single = torch.compiler.is_compiling() and self.chunk >= self.count
        return SingleState() if single else ChunkState()

    def _fill(self, index: int, memory: ClassMemory, classes: slice) -> None:
        every = slice(0, self.image.crops)
        before, remembered = self._behind(index - 1, every, classes)
        empty = memory.part()

        def advance(before: Tensor | None, classes: slice) -> tuple[Tensor, ClassMemory]:
            x, part = self._before(index - 1, every, classes, before, remembered), empty.part()
            x = self._blocks(index, every, x)
            self._collect(index, part, x, classes, last=False)
            return x, part

        x, part = self._run(advance, before, classes)
        memory.merge(part)
        assert self.state is not None
        self.state.save(classes, x)

    def _decode(self, crops: slice, classes: slice, out: Tensor | None = None) -> Tensor:
        last = len(self.plan.layers) - 1
        before, remembered = self._behind(last, crops, classes)

        def finish(before: Tensor | None, classes: slice) -> Tensor:
            x = self._before(last, crops, classes, before, remembered)
            decoder = self.image.of(crops).decoder
            return self.stages.decode(self.plan, decoder, x, self.image.resolution, None, None)

        logits: Tensor = self._run(finish, before, classes)
        return logits

    def _behind(self, index: int, crops: slice, classes: slice) -> tuple[Tensor | None, ClassMemory | None]:
        """Return a chunk after a layer's window blocks, and the layer's memory; None before the first."""
        if index < 0:
            return None, None
        assert self.state is not None
        return self.state.load(crops, classes), self.memories[index].of(crops)

    def _before(
        self, index: int, crops: slice, classes: slice, x: Tensor | None, memory: ClassMemory | None
    ) -> Tensor:
        """Return a chunk after the class attention of a layer; before the first, after the embedding."""
        if x is None or memory is None:
            return self._embed(crops, classes)
        return self._attend(index, crops, classes, x, memory)

    def _run(self, function: Callable[..., Any], *inputs: Tensor | slice | None) -> Any:
        """Call a function without random numbers, and again in the backward pass if the schedule requires it.

        Classes are an input of it, as `torch.compile` turns numbers that it refers to into constants.
        """
        if self.schedule.policy != "checkpoint":
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class ChunkState:
    """The chunks themselves, so that gradients flow through them; saved in ascending order in each pass."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[int, int], Tensor] = {}

    def load(self, crops: slice, classes: slice) -> Tensor:
        parts = [
            x[crops, max(classes.start - start, 0) : classes.stop - start]
            for (start, stop), x in sorted(self.chunks.items(), key=lambda item: item[0])
            if start < classes.stop and stop > classes.start
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def save(self, classes: slice, x: Tensor) -> None:
        chunks = {}
        for (start, stop), old in self.chunks.items():
            if stop <= classes.start or start >= classes.stop:
                chunks[start, stop] = old
            elif stop > classes.stop:  # a chunk of the last pass, whose steps were larger
                chunks[classes.stop, stop] = old[:, classes.stop - start :]
        self.chunks = {**chunks, (classes.start, classes.stop): x}
