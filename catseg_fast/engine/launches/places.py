"""Tensors of a function as places in its inputs, outputs and buffers, and its launches on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels.launch.launcher import Launch


@dataclass(frozen=True)
class Place:
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
class Step:
    """A launch with its arguments in order, and the places of pointers and tensor descriptors by index."""

    launch: Launch
    values: list[Any]
    pointers: list[tuple[int, Place]]
    descriptors: list[tuple[int, Any, Place]]

    @property
    def places(self) -> list[Place]:
        return [place for _, place in self.pointers] + [place for _, _, place in self.descriptors]

    def moved(self, numbers: dict[int, int], offsets: dict[int, int]) -> Step:
        """Return the step with renumbered buffers, and offsets in them."""

        def move(place: Place) -> Place:
            offset = place.offset + offsets.get(place.buffer, 0)
            return Place(numbers[place.buffer], offset, place.shape, place.stride, place.dtype)

        pointers = [(index, move(place)) for index, place in self.pointers]
        descriptors = [(index, value, move(place)) for index, value, place in self.descriptors]
        return Step(self.launch, self.values, pointers, descriptors)
