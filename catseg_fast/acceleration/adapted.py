"""An aggregator in the engine whose project has registered an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catseg_fast.acceleration import trial
from catseg_fast.acceleration.adapters import Adapter
from catseg_fast.acceleration.layers import Mismatch
from catseg_fast.acceleration.part import Inputs
from catseg_fast.acceleration.reading import read_aggregator
from catseg_fast.acceleration.trial import Factors, Random, Resolution
from catseg_fast.acceleration.whole import GuardedEngine, WholeAggregator, make_inputs, max_classes
from catseg_fast.engine.streaming import Stream
from catseg_fast.errors import InputError


class AdaptedAggregator(WholeAggregator):
    """An aggregator whose arguments an adapter maps to upstream's."""

    kind = "aggregator, by an adapter"
    divisible = False

    def __init__(self, module: nn.Module, name: str, adapter: Adapter, verify: bool = True) -> None:
        super().__init__(module, name, verify)
        self.adapter = adapter
        self.engine = CostVolumeEngine(nn.Module())

    def check_code(self) -> None:
        adapter = self.adapter

        def examples(
            aggregator: Any, size: Resolution | None, random: Random, classes: int, factors: Factors
        ) -> tuple[Any, ...]:
            inputs = make_inputs(aggregator, size, random, classes, factors, adapter.prompts)
            return _asked(adapter.example, aggregator, *inputs)

        def prepare(aggregator: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
            engine = CostVolumeEngine(read_aggregator(aggregator))
            engine.backend, engine.precision = "torch", dtype
            return lambda *args: _run(engine, adapter, aggregator, args, {})

        trial.check_code(self.module, examples, prepare)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Inputs | None:
        return (tuple(args), kwargs)

    def run(self, inputs: Inputs) -> Any:
        args, kwargs = inputs
        return _run(self.engine, self.adapter, self.module, args, kwargs)


# Of the call that runs; a model may be called by several threads.
_cost_volume: ContextVar[Tensor | None] = ContextVar("cost_volume", default=None)


class CostVolumeEngine(GuardedEngine):
    """An engine that embeds a cost volume where it is given one."""

    def _streams(self, *arguments: Any) -> list[Stream]:
        streams = super()._streams(*arguments)
        if (cost_volume := _cost_volume.get()) is not None:
            for stream in streams:
                if stream.selected is not None:
                    raise InputError("text_feats: classes are selected only from upstream's cost volume")
                stream.__class__ = CostVolumeStream
                stream.cost_volume, stream.spectra = cost_volume, None  # type: ignore[attr-defined]
        return streams


class CostVolumeStream(Stream):
    """A stream over the classes of a given cost volume `[B, P, T, H, W]`."""

    cost_volume: Tensor

    def _embed(self, crops: slice, classes: slice) -> Tensor:
        part, plan = self.cost_volume[crops, :, classes], self.plan
        maps = part.transpose(1, 2).flatten(0, 1).to(plan.embed.dtype)
        maps = F.conv2d(maps, plan.embed, plan.embed_bias, padding=3)
        return maps.flatten(2).transpose(1, 2).unflatten(0, (part.shape[0], part.shape[2]))


def _run(
    engine: Any, adapter: Adapter, aggregator: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    inputs = _asked(adapter.inputs, aggregator, *args, **kwargs)
    cost_volume = _asked(adapter.cost_volume, aggregator, *args, **kwargs)
    if cost_volume is not None and engine.graphs != "off":
        engine.graphs = "off"  # a recording would not be given the cost volume
    token = _cost_volume.set(cost_volume)
    try:
        logits = engine.logits(*inputs, max_classes(aggregator))
    finally:
        _cost_volume.reset(token)
    return _asked(adapter.finish, aggregator, logits, *args, **kwargs)


def _asked(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an adapter's method.

    Raises:
        Mismatch: if it fails; the message names it.
    """
    try:
        return method(*args, **kwargs)
    except Exception as error:  # unknown code may raise anything
        name = method.__qualname__
        raise Mismatch(f"the adapter's {name} fails: {type(error).__name__}: {error}") from error
