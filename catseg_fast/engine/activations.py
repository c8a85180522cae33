"""The largest value in each stage of the engine, to compare with fp16's range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catseg_fast.engine.engine import Engine
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.stages import Stages

STAGES = ("embed_cost_volume", "window_block", "class_collect", "class_apply", "decode")


@contextmanager
def record_activations(engine: Engine) -> Iterator[dict[str, float]]:
    """Record the largest absolute value of each stage of an engine while the context lasts.

    A stage's values are its inputs and the outputs of its operations: every intermediate value on the torch
    back end, and the kernels' outputs on Triton. A stage that computes a NaN has the value infinity.

    Yields:
        Values by stage, in the order of computation: "layer 1, block 2", "layer 1, classes, collect", …
    """
    largest: dict[str, float] = {}
    original = engine.stages

    def stages(plan: Plan, *arguments: Any) -> _Recorder:
        return _Recorder(original(plan, *arguments), _names(plan), largest)

    graphs, engine.graphs = engine.graphs, "off"  # a recording does not call the stages
    vars(engine)["stages"] = stages
    try:
        yield largest
    finally:
        del vars(engine)["stages"]  # restores the method of the class
        engine.graphs = graphs


class _Recorder:
    """Stages that run others and record their values."""

    def __init__(self, stages: Stages, names: Mapping[int, str], largest: dict[str, float]) -> None:
        self._stages, self._names, self._largest = stages, names, largest

    collects_at_once = False  # as in torch: nothing is written to the state
    repeats = False  # each stage is called by itself

    def __getattr__(self, stage: str) -> Any:
        function = getattr(self._stages, stage)
        return self._watched(stage, function) if stage in STAGES else function

    def _watched(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(part: Any, *arguments: Any) -> Any:
            name = self._names.get(id(part), stage)
            if stage in ("class_collect", "class_apply"):
                name += f", {stage.removeprefix('class_')}"
            watch = _Watch()
            given = arguments[:3] if stage == "decode" else arguments  # then comes the destination
            watch.see([value for value in given if isinstance(value, Tensor)])
            with watch:
                result = function(part, *arguments)
            self._largest[name] = max(self._largest.get(name, 0.0), watch.largest())
            return result

        return run


class _Watch(TorchDispatchMode):
    """Keeps the largest absolute value in the outputs of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            self.see(tree_leaves(result))
        return result

    def see(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                self._seen.append(value.detach().abs().amax().double())

    def largest(self) -> float:
        if not self._seen:
            return 0.0
        value = torch.stack(self._seen).max().item()
        return float("inf") if value != value else value


def _names(plan: Plan) -> dict[int, str]:
    """Return the names of a plan's parts, by their identities."""
    names = {}
    for number, layer in enumerate(plan.layers, 1):
        names[id(layer.classes)] = f"layer {number}, classes"
        names |= {id(block): f"layer {number}, block {index}" for index, block in enumerate(layer.blocks, 1)}
    return names
