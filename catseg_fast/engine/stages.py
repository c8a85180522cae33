"""The interface of the engine's stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from catseg_fast.engine.class_memory import ClassMemory
from catseg_fast.engine.folding import ClassLayer, Plan, WindowBlock
from catseg_fast.engine.terms import BlockGuidance

Resolution = tuple[int, int]


class Stages(Protocol):
    """Implementation of the stages: the module `torch_stages`, or an object with the same functions."""

    def embed_cost_volume(
        self, plan: Plan, image: Tensor, text: Tensor, resolution: Resolution, /
    ) -> Tensor: ...

    @property
    def collects_at_once(self) -> bool: ...

    @property
    def repeats(self) -> bool: ...

    def as_one(self, key: object, run: Callable[..., Tensor], /, *inputs: Tensor | None) -> Tensor: ...

    def window_block(
        self, block: WindowBlock, guidance: BlockGuidance, x: Tensor, out: Tensor | None, /
    ) -> Tensor: ...

    def class_collect(
        self,
        layer: ClassLayer,
        memory: ClassMemory,
        x: Tensor,
        key: Tensor | None,
        resolution: Resolution,
        last: bool,
        /,
    ) -> None: ...

    def class_apply(
        self,
        layer: ClassLayer,
        x: Tensor,
        query: Tensor | None,
        memory: ClassMemory,
        resolution: Resolution,
        /,
    ) -> Tensor: ...

    def decode(
        self,
        plan: Plan,
        guidance: tuple[Tensor, Tensor],
        x: Tensor,
        resolution: Resolution,
        out: Tensor | None,
        flag: Tensor | None,
        /,
    ) -> Tensor: ...
