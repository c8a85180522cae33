"""Telling whether two computations are the same but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from catseg_fast.reference.aggregator import DROPPED_LOGIT

# Largest difference, in units of the answer's spread, that rounding explains.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

# In 16 bits, the largest error in units of the model's own, both against fp32.
FACTOR = 2.0

# The least error that is allowed there, in units of the answer's spread: as much as the answer's own type has.
LEAST = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# Of an answer in fp16 whose model computes in fp32, on a GPU; and where the model's own code does not run in 16 bits.
COARSE = 3e-2


def differs(ours: Tensor, own: Tensor, tolerance: float | None = None) -> str | None:
    """Return how far two answers differ; None if not more than rounding explains."""
    if ours.shape != own.shape:
        return f"its answer is {tuple(own.shape)}, the engine's {tuple(ours.shape)}"
    pair = _comparable(ours, own)
    if isinstance(pair, str):
        return pair
    difference = _largest(pair[0] - pair[1]) / _spread(pair[1])
    if difference <= (TOLERANCE[own.dtype] if tolerance is None else tolerance):
        return None
    return f"relative difference {difference:.1e}"


def differs_in_16_bits(ours: Tensor, own: Tensor, truth: Tensor) -> str | None:
    """Return how far an answer is off; None if not more than twice as far as the model's own, from fp32."""
    if not ours.shape == own.shape == truth.shape:
        return f"its answer is {tuple(own.shape)}, the engine's {tuple(ours.shape)}"
    keep = ~(_dropped(ours) | _dropped(own) | _dropped(truth))
    right, other = _dropped(ours) != _dropped(truth), _dropped(own) != _dropped(truth)
    if int(right.sum()) > FACTOR * int(other.sum()):
        return f"{int(right.sum())} classes are selected otherwise than in fp32"
    x, y, exact = (z.to(truth.dtype)[keep] for z in (ours, own, truth))
    finite = x.isfinite() & y.isfinite() & exact.isfinite()
    if bool((x.isfinite() != y.isfinite()).any()):
        return "other values are infinite or NaN"
    if not bool(finite.any()):
        return None
    errors = [z[finite] - exact[finite] for z in (x, y)]
    least = LEAST.get(own.dtype, 0.0) * _spread(exact[finite])
    for measure in (_largest, _root_mean_square):
        found, allowed = map(measure, errors)
        if not found <= max(FACTOR * allowed, least):
            return f"error {found:.1e}, of the model's own code {allowed:.1e}, both against fp32"
    return None


def _comparable(ours: Tensor, own: Tensor) -> tuple[Tensor, Tensor] | str:
    """Both without dropped classes and without what is no number in both."""
    dropped = _dropped(own)
    if not torch.equal(dropped, _dropped(ours)):
        return f"other classes are dropped, in {int((dropped != _dropped(ours)).sum())} maps"
    x, y = ours.to(own.dtype)[~dropped], own[~dropped]
    if not torch.equal(x.isnan(), y.isnan()) or not torch.equal(x.isinf(), y.isinf()):
        return "other values are infinite or NaN"
    finite = y.isfinite()
    return x[finite], y[finite]


def _dropped(logits: Tensor) -> Tensor:
    """The maps `[B, T]` of dropped classes among logits `[B, T, H, W]`; none in other tensors."""
    if logits.ndim != 4:
        return torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return (logits == DROPPED_LOGIT).flatten(2).all(dim=-1)


def _spread(x: Tensor) -> float:
    """What differences are measured by: the standard deviation, and not next to nothing."""
    if x.numel() < 2:
        return max(_largest(x), 1e-30)
    return max(x.std().item(), 1e-2 * _largest(x), 1e-30)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0
