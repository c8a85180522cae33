"""What chunks of classes are between two passes of the engine."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from catseg_fast.plan import Plan
from catseg_fast.terms import ImageTerms


class State(Protocol):
    """The chunks' `[B, t, HW, C]`, by slices of crops and classes."""

    def load(self, crops: slice, classes: slice) -> Tensor:
        """What was saved for these crops and classes."""

    def save(self, classes: slice, x: Tensor) -> None:
        """Keep a chunk of all crops."""


def new_state(policy: str, plan: Plan, image: ImageTerms, classes: int, differentiable: bool) -> State | None:
    """The state that a memory policy keeps for T classes; None where chunks are computed again."""
    if differentiable:
        return ChunkState()
    if policy == "recompute" or not plan.layers:
        return None
    shape = (image.crops, classes, image.features.shape[1], plan.channels)
    return (
        OffloadedState(shape, image.features) if policy == "offload" else ResidentState(shape, image.features)
    )


class ResidentState:
    """One tensor `[B, T, HW, C]` beside the features, updated in place."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.tensor = like.new_empty(shape)

    def load(self, crops: slice, classes: slice) -> Tensor:
        return self.tensor[crops, classes]

    def save(self, classes: slice, x: Tensor) -> None:
        self.tensor[:, classes] = x


class OffloadedState:
    """One tensor `[B, T, HW, C]` in host memory, pinned where there is a GPU: its copies then need no host.

    All copies are queued on the device's current stream: a load waits for the save before it, and the host
    waits for neither.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.device = like.device
        self.tensor = torch.empty(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")

    def load(self, crops: slice, classes: slice) -> Tensor:
        return torch.stack([crop[classes].to(self.device, non_blocking=True) for crop in self.tensor[crops]])

    def save(self, classes: slice, x: Tensor) -> None:
        for crop, chunk in zip(self.tensor, x, strict=True):
            crop[classes].copy_(chunk, non_blocking=True)


class ChunkState:
    """The chunks as they are, for gradients to flow through."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[int, int], Tensor] = {}

    def load(self, crops: slice, classes: slice) -> Tensor:
        parts = [
            x[crops, max(classes.start - start, 0) : classes.stop - start]
            for (start, stop), x in sorted(self.chunks.items())
            if start < classes.stop and stop > classes.start
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def save(self, classes: slice, x: Tensor) -> None:
        self.chunks[classes.start, classes.stop] = x
