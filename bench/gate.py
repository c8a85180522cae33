"""The correctness gate: nothing with a wrong result is timed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench.cases import Case, make_call

FACTOR = 2.0  # largest error, in units of plain torch's in the same type

# Above these numbers of crops times classes the reference's own tensors fill a GPU, or in float64 a common
# computer's memory; the torch back end takes its place.
MOST_CROP_CLASSES = {"cuda": 5 * 256, "cpu": 256}


class WrongAnswer(AssertionError):
    """An error that is larger than the gate accepts."""


def check(ours: Tensor, eager: Tensor, truth: Tensor, factor: float = FACTOR) -> float:
    """Return the largest error of `ours` over that of `eager`, against `truth`; all have the same shape.

    Raises:
        WrongAnswer: if the largest or the root-mean-square error is above `factor` times that of `eager`, or
            not a number.
    """
    if ours.shape != truth.shape:
        raise WrongAnswer(f"no speed for a wrong answer: shape {tuple(ours.shape)}, not {tuple(truth.shape)}")
    found, allowed = (x.to(truth.dtype).sub(truth).abs() for x in (ours, eager))
    pairs = {
        "largest": (found.max().item(), allowed.max().item()),
        "root-mean-square": (found.square().mean().sqrt().item(), allowed.square().mean().sqrt().item()),
    }
    for name, (error, of_eager) in pairs.items():
        if not error <= factor * of_eager:
            raise WrongAnswer(
                f"no speed for a wrong answer: {name} error {error:.2e}, of plain torch {of_eager:.2e}"
            )
    error, of_eager = pairs["largest"]
    return error / of_eager if of_eager else 0.0


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the truth for results in `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


@functools.lru_cache(maxsize=1)
def expected(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return logits `[B, T, 4H, 4W]` of plain torch in `dtype`, and the truth.

    Both come from the reference if its tensors fit and all classes are aggregated; otherwise from the torch
    back end, which streams, and selects classes by the same fp32 features in every type.
    """
    return _plain(case, dtype, device), _plain(case, precise(dtype), device)


def _plain(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor:
    call = make_call(case, device)
    if case.selects or case.crops * case.classes > MOST_CROP_CLASSES[device.type]:
        call.aggregator.backend, call.aggregator.engine.precision = "torch", dtype
        return call()
    call.aggregator.backend = "reference"
    return call.to(dtype)()
