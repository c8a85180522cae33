"""Comparison of a module's own code with the engine's, on a copy with random numbers (`copies.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from catseg_fast.acceleration.comparing import differs
from catseg_fast.acceleration.copies import copy_for_trial, lower_pad_len, shrink
from catseg_fast.acceleration.layers import Mismatch
from catseg_fast.acceleration.swapping import own_code

CROPS = 2

Resolution = tuple[int, int]
# Of a copy, a resolution (None: the module's), crops, classes, a factor for guidance: arguments of a call.
MakeInputs = Callable[[Any, "Resolution | None", "Random", int, float], tuple[Any, ...]]
# Of a copy, whose weights have a type: what computes the engine's answer in it from such arguments.
Prepare = Callable[[Any, torch.dtype], Callable[..., Tensor]]


class Random:
    """Random tensors of a type on a device, for a number of crops."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def index(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self._generator, device=self.device)


def check_code(module: nn.Module, make_inputs: MakeInputs, prepare: Prepare, method: str = "forward") -> None:
    """Compare what a module's method computes with what the engine does.

    On small maps; where the module does not run on these, on those that it was built for.

    Raises:
        Mismatch: if they differ.
    """
    duplicate = copy_for_trial(module)
    lengths, size = lower_pad_len(duplicate), shrink(duplicate)
    try:
        _compare(duplicate, size, lengths, make_inputs, prepare, method)
    except _Fails as failure:
        if size is None:
            raise Mismatch(str(failure)) from failure
        duplicate = copy_for_trial(module)
        try:
            _compare(duplicate, None, lower_pad_len(duplicate), make_inputs, prepare, method)
        except _Fails as again:
            raise Mismatch(str(again)) from again


class _Fails(Exception):
    """The module's own code does not run."""


def _compare(
    duplicate: nn.Module,
    size: Resolution | None,
    lengths: list[int],
    make_inputs: MakeInputs,
    prepare: Prepare,
    method: str,
) -> None:
    few, many = (min(lengths) - 1, max(lengths) + 2) if lengths else (2, 5)
    device = next(duplicate.parameters()).device
    engines: dict[torch.dtype, Callable[..., Tensor]] = {}
    for seed, (classes, scale) in enumerate(((few, 1.0), (many, 8.0), (few, 0.125))):
        for dtype in (torch.float64, torch.float32):  # in float64 some code mixes types
            duplicate.to(dtype)
            inputs = make_inputs(duplicate, size, Random(dtype, device, seed), classes, scale)
            try:
                with own_code(), torch.autocast(device.type, enabled=False):
                    own = getattr(type(duplicate), method)(duplicate, *inputs)
            except Exception as error:  # whatever the module's own code raises
                if dtype == torch.float64:
                    continue
                raise _Fails(
                    f"it does not run on upstream's arguments: {type(error).__name__}: {error}"
                ) from error
            if not isinstance(own, Tensor):
                raise Mismatch(f"it returns a {type(own).__name__}, expected a tensor")
            if dtype not in engines:
                engines[dtype] = prepare(duplicate, dtype)
            if (reason := differs(engines[dtype](*inputs), own)) is not None:
                raise Mismatch(
                    f"it computes something different from upstream's ({reason} on random numbers)"
                )
            break
