"""What an op module says of its kernels, so that the tuner can time them without knowing them.

A module of `kernels.TUNABLE_OPS` has a function

    def tunables(workload: Workload) -> list[Tunable]: ...

that lists the kernels of its op at the workload's sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.configs import Problem


@dataclass(frozen=True)
class Workload:
    """Sizes of a launch; by default those of the published variants.

    Attributes:
        capability: compute capability of the GPU, of `compile_target.CAPABILITIES`.
        dtype: of the tensors.
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".
        crops: B.
        classes: t, of one launch.
        prompts: P of each variant.
        decoder: output channels of each decoder stage.
    """

    capability: int
    dtype: torch.dtype
    input_precision: str
    crops: int
    classes: int
    height: int = 24
    width: int = 24
    channels: int = 128
    heads: int = 4
    window: int = 12
    hidden: int = 512
    features: int = 768
    prompts: tuple[int, ...] = (80, 1)
    decoder: tuple[int, ...] = (64, 32)

    @property
    def positions(self) -> int:
        """Positions of a crop."""
        return self.height * self.width

    @property
    def crop_classes(self) -> int:
        """Crops times classes."""
        return self.crops * self.classes

    @property
    def state(self) -> tuple[int, int, int, int]:
        """Shape `[B, t, HW, C]` of a chunk's state."""
        return self.crops, self.classes, self.positions, self.channels

    def normal(self, device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers of a standard deviation of `scale`, in the workload's type."""
        return (torch.randn(shape, device=device) * scale).to(self.dtype)

    def layers(self, device: torch.device, *shapes: tuple[int, int]) -> list[Tensor]:
        """Weights `[out, in]` of linear layers that keep a deviation of one, each with its bias behind it."""
        return [
            tensor
            for out, features in shapes
            for tensor in (
                self.normal(device, out, features, scale=features**-0.5),
                self.normal(device, out, scale=0.3),
            )
        ]


@dataclass(frozen=True)
class Tunable:
    """A kernel at certain sizes, and what is worth timing.

    Attributes:
        problem: what a measured config will be found by.
        candidates: configs, the default first. Not all need to fit the GPU.
        make_inputs: random tensors on a device (some may be None), of a real launch's shapes and scale.
        run: launches the kernel on such tensors with a config, and returns what it computes. It may overwrite
            them, but with numbers that it takes as long for.
    """

    problem: Problem
    candidates: tuple[LaunchConfig, ...]
    make_inputs: Callable[[torch.device], tuple[Tensor | None, ...]]
    run: Callable[[Sequence[Any], Any], Sequence[Tensor]]
