"""The engine's ops one by one, on the random chunks of classes that their declarations make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels import TUNABLE_OPS, load
from catseg_fast.kernels.launch.op import Op, Random

RESOLUTION = (24, 24)
STAGES = tuple(
    ", ".join(filter(None, (name, variant))) for name in TUNABLE_OPS for variant in load(name).sizes
)


@dataclass(frozen=True)
class StageCall:
    """An op and its arguments."""

    op: Op
    inputs: dict[str, Any]

    def plain(self) -> Tensor:
        """Run the op in plain torch."""
        return _answer(self.op.plain(**self.inputs))

    def triton(self) -> Tensor:
        """Run the op on kernels."""
        return _answer(self.op.triton(**self.inputs))

    def to(self, dtype: torch.dtype) -> StageCall:
        """Return the same call in another type."""
        return StageCall(self.op, {name: _cast(value, dtype) for name, value in self.inputs.items()})

    def least_bytes(self, answer: Tensor) -> int:
        """Return the bytes of the chunk (or what its cost volume is made of) and of the result."""
        read = [self.inputs[name] for name in ("x", "image", "text") if name in self.inputs]
        return answer.nbytes + sum(x.nbytes for x in read)


def variant_of(stage: str) -> str:
    """Return the published variant that has a stage's sizes."""
    return "v1-vitl-swinb" if stage.endswith("P=80") else "v2-vitl"


@torch.no_grad()
def make_stage_call(
    stage: str, crops: int, classes: int, dtype: torch.dtype, device: torch.device
) -> StageCall:
    """Return a stage on random weights and inputs, the same every time."""
    name, _, variant = stage.partition(", ")
    op = load(name)
    sizes = replace(op.sizes[variant], crops=crops, classes=classes)
    return StageCall(op, op.make_inputs(sizes, Random(dtype, device)))


def _answer(result: Any) -> Tensor:
    """Return the result that is compared: for class_collect, the sums of products."""
    answer: Tensor = result[0] if isinstance(result, tuple) else result
    return answer


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    return value
