"""Comparison of a module's own code with the engine's, on a copy with random numbers (`copies.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from catseg_fast.acceleration.comparing import differs
from catseg_fast.acceleration.copies import copy_for_trial, lower_pad_len, lower_prompts, shrink
from catseg_fast.acceleration.layers import Mismatch
from catseg_fast.acceleration.swapping import own_code

CROPS = 2

# By call and crop: what clamps its input, or treats large or small numbers apart, shows.
FACTORS = ((1.0, 0.01), (100.0, 1.0))

Resolution = tuple[int, int]
Factors = tuple[float, ...]  # by crop
# Of a copy, a resolution (None: the module's), classes, factors for what is not normalised: arguments.
MakeInputs = Callable[[Any, "Resolution | None", "Random", int, Factors], tuple[Any, ...]]
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


def by_crop(x: Tensor, factors: Factors) -> Tensor:
    """Return `x [B, ...]`, each crop times its factor."""
    return x * x.new_tensor(factors).view(-1, *(1,) * (x.ndim - 1))


def _differ(ours: Tensor, own: Tensor) -> str | None:
    """Return how far answers of some crop differ: beside those of a large factor, others would not count."""
    if ours.shape != own.shape:
        return differs(ours, own)
    pairs = zip(ours.split(1), own.split(1), strict=True)
    return next((reason for pair in pairs if (reason := differs(*pair)) is not None), None)


class _Fails(Exception):
    """The module's own code does not run."""


@dataclass(frozen=True)
class _Trial:
    duplicate: nn.Module
    lengths: list[int]  # numbers of classes at which something may change
    size: Resolution | None
    make_inputs: MakeInputs
    prepare: Prepare
    method: str

    def compare(self) -> None:
        """Compare both codes, with few classes and with many.

        Raises:
            Mismatch: if they differ.
            _Fails: if the module's own code does not run.
        """
        few, many = (min(self.lengths) - 1, max(self.lengths) + 2) if self.lengths else (2, 5)
        dtype, engines = torch.float64, dict[torch.dtype, Callable[..., Tensor]]()
        for calls in ((few, FACTORS[0], 0), (many, FACTORS[1], 1)):
            try:
                inputs, own = self._own(dtype, *calls)
            except _Fails:
                if dtype == torch.float32:
                    raise
                dtype = torch.float32  # some code mixes types
                self.duplicate.to(dtype)
                inputs, own = self._own(dtype, *calls)
            if not isinstance(own, Tensor):
                raise Mismatch(f"it returns a {type(own).__name__}, expected a tensor")
            if dtype not in engines:
                engines[dtype] = self.prepare(self.duplicate, dtype)
            if (reason := _differ(engines[dtype](*inputs), own)) is not None:
                raise Mismatch(
                    f"it computes something different from upstream's ({reason} on random numbers)"
                )

    def _own(
        self, dtype: torch.dtype, classes: int, factors: Factors, seed: int
    ) -> tuple[tuple[Any, ...], Any]:
        """Return arguments, and the answer of the module's own code."""
        device = next(self.duplicate.parameters()).device
        inputs = self.make_inputs(self.duplicate, self.size, Random(dtype, device, seed), classes, factors)
        try:
            with own_code(), torch.autocast(device.type, enabled=False):
                return inputs, getattr(type(self.duplicate), self.method)(self.duplicate, *inputs)
        except Exception as error:  # whatever the module's own code raises
            raise _Fails(
                f"it does not run on upstream's arguments: {type(error).__name__}: {error}"
            ) from error


def check_code(module: nn.Module, make_inputs: MakeInputs, prepare: Prepare, method: str = "forward") -> None:
    """Compare what a module's method computes with what the engine does.

    On small maps and with few prompts; where the module does not run on these, as it was built.

    Raises:
        Mismatch: if they differ.
    """
    duplicate = copy_for_trial(module)
    lengths, size, fewer = lower_pad_len(duplicate), shrink(duplicate), lower_prompts(duplicate)
    try:
        _Trial(duplicate, lengths, size, make_inputs, prepare, method).compare()
    except _Fails as failure:
        if size is None and not fewer:
            raise Mismatch(str(failure)) from failure
        duplicate = copy_for_trial(module)
        lengths = lower_pad_len(duplicate)
        try:
            _Trial(duplicate, lengths, None, make_inputs, prepare, method).compare()
        except _Fails as again:
            raise Mismatch(str(again)) from again
