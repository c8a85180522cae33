"""Memory of the class attention, the only part of the engine that combines classes.

Linear attention needs only `K^T V` and `sum K` for any number of classes, so that classes can stream through
in chunks. Softmax attention has no such summary: its memory holds every key and value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from catseg_fast.engine.folding import ClassLayer, wide
from catseg_fast.engine.kept import kept
from catseg_fast.errors import InputError
from catseg_fast.kernels.attention import attend
from catseg_fast.kernels.class_attention import plain


class ClassMemory(Protocol):
    """Keys and values of all classes, for queries of any chunk of them."""

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add a chunk's keys and values `[B, t, hw, C]`."""

    def part(self) -> ClassMemory:
        """Return an empty memory for a part of the classes, without the padding tokens."""

    def merge(self, part: Any) -> None:
        """Add the contents of a part."""

    def close(self, dtype: torch.dtype) -> None:
        """Prepare for queries of a type, after all classes were added."""

    def of(self, crops: slice) -> ClassMemory:
        """Return the memory of some crops."""

    def attend(self, queries: Tensor) -> Tensor:
        """Attend from `queries [B, t, hw, C]` to all classes that were added."""


def new_memory(layer: ClassLayer, classes: int, padded: bool = True) -> ClassMemory:
    """Return a memory for T classes, empty but for the padding tokens, if `padded`."""
    if not layer.linear:
        return FullMemory.new(layer, classes)
    return LinearMemory.new(layer, classes, padded)


@dataclass
class LinearMemory:
    """`K^T V / length` and `sum K` over the classes, in fp32 at least.

    n padding tokens add n times the outer product of their key and value, and n times their key. `close`
    replaces `key_value` by the means of values.
    """

    heads: int
    eps: float
    length: int  # classes and padding tokens; divides values, which keeps them in fp16's range
    key_value: Tensor | float  # [B, hw, heads, d, d]
    key_sum: Tensor | float  # [B, hw, heads, d]
    means: Tensor | None = None  # [B, hw, heads, d, d], in the type of queries

    @classmethod
    def new(cls, layer: ClassLayer, classes: int, padded: bool = True) -> LinearMemory:
        # These may be symbols of a graph for any T, and Python's max would specialise on one side of
        # `pad_len`.
        length: Any = torch.sym_max(classes, layer.pad_len)
        padding: Any = torch.sym_max(layer.pad_len - classes, 0)
        full = not torch.compiler.is_compiling() and padding == 0
        if layer.padding is None or not padded or full:
            return cls(layer.heads, layer.eps, length, 0.0, 0.0)
        tokens = layer.padding

        def sums() -> tuple[Tensor, Tensor]:
            key, value = (wide(x).view(layer.heads, -1) for x in tokens.chunk(2))
            key = padding * plain.feature_map(key)
            return torch.einsum("hd,hv->hdv", key, value / length), key

        key_value, key = kept(layer, (padding, length), tokens.device, sums)
        return cls(layer.heads, layer.eps, length, key_value, key)

    def add(self, keys: Tensor, values: Tensor) -> None:
        sums = plain.add_up(keys, values, self.key_value, self.key_sum, self.heads, self.length)
        self.key_value, self.key_sum = sums

    def part(self) -> LinearMemory:
        return replace(self, key_value=0.0, key_sum=0.0)

    def merge(self, part: LinearMemory) -> None:
        self.key_value, self.key_sum = part.key_value + self.key_value, part.key_sum + self.key_sum

    def close(self, dtype: torch.dtype) -> None:
        if self.means is None:
            assert isinstance(self.key_value, Tensor)
            assert isinstance(self.key_sum, Tensor)
            self.means = plain.mean_values(self.key_value, self.key_sum, self.length, dtype)
            self.key_value = 0.0

    def of(self, crops: slice) -> LinearMemory:
        means, key_sum = self.closed()
        if crops == slice(0, len(means)):
            return self
        return replace(self, key_sum=key_sum[crops], means=means[crops])

    def attend(self, queries: Tensor) -> Tensor:
        means, key_sum = self.closed()
        return plain.attend_linearly(queries, means, key_sum, self.heads, self.eps)

    def closed_with(self, means: Tensor, key_sum: Tensor) -> LinearMemory:
        """Return a memory of the same kind with other sums."""
        return replace(self, key_value=0.0, key_sum=key_sum, means=means)

    def closed(self) -> tuple[Tensor, Tensor]:
        """Return the means and `key_sum`.

        Raises:
            InputError: if the memory is not closed.
        """
        if self.means is None or not isinstance(self.key_sum, Tensor):
            raise InputError("memory: is not closed, or no class was added")
        return self.means, self.key_sum


@dataclass
class FullMemory:
    """Every key and value; n padding tokens are a single one whose score is raised by log n."""

    heads: int
    padding: tuple[Tensor, Tensor] | None
    padding_score: float
    chunks: list[tuple[Tensor, Tensor]]  # [B, t, hw, C] each

    @classmethod
    def new(cls, layer: ClassLayer, classes: int) -> FullMemory:
        count = layer.pad_len - classes
        if layer.padding is None or count <= 0:
            return cls(layer.heads, None, 0.0, [])
        key, value = layer.padding.chunk(2)
        return cls(layer.heads, (key, value), math.log(count), [])

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.chunks.append((keys, values))

    def part(self) -> FullMemory:
        return replace(self, chunks=[])

    def merge(self, part: FullMemory) -> None:
        self.chunks += part.chunks

    def close(self, dtype: torch.dtype) -> None:
        pass

    def of(self, crops: slice) -> FullMemory:
        return replace(self, chunks=[(keys[crops], values[crops]) for keys, values in self.chunks])

    def attend(self, queries: Tensor) -> Tensor:
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*self.chunks, strict=True))
        scores = None
        if self.padding is not None:
            shape = (keys.shape[0], 1, *keys.shape[2:])
            keys, values = (
                torch.cat([x, padding.expand(shape)], dim=1)
                for x, padding in zip((keys, values), self.padding, strict=True)
            )
            scores = keys.new_zeros(1, keys.shape[1])
            scores[:, -1] = self.padding_score
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
            for x in (queries, keys, values)
        )  # B*hw, heads, t or T, d
        attended = attend(q, k, v, scores, many=False)
        return attended.unflatten(0, (len(queries), -1)).permute(0, 3, 1, 2, 4).flatten(-2)
