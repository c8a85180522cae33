"""Comparison of two computations that may differ only by rounding."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest difference, in units of the answer's spread, that rounding explains.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

# In 16 bits, the largest error in units of the model's own, both against fp32.
FACTOR = 2.0

# The least error that is allowed there, in units of the answer's spread: what the answer's own type has.
LEAST = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# Largest root-mean-square error, in units of the answer's spread, of 16 bits against fp32.
COARSE = 5e-2


def differs(ours: Tensor, own: Tensor) -> str | None:
    """Return how far two answers differ; None if rounding explains it."""
    if ours.shape != own.shape:
        return f"its answer is {tuple(own.shape)}, the engine's {tuple(ours.shape)}"
    pair = _comparable(ours, own)
    if isinstance(pair, str):
        return pair
    difference = _largest(pair[0] - pair[1]) / _spread(pair[1])
    return None if difference <= TOLERANCE[own.dtype] else f"relative difference {difference:.1e}"


def differs_roughly(ours: Tensor, truth: Tensor) -> str | None:
    """Return how far an answer in 16 bits is from one in fp32; None if 16 bits explain it."""
    pair = _comparable(ours, truth)
    if isinstance(pair, str):
        return pair
    difference = _root_mean_square(pair[0] - pair[1]) / _spread(pair[1])
    return None if difference <= COARSE else f"relative difference {difference:.1e} from fp32"


def differs_in_16_bits(ours: Tensor, own: Tensor, truth: Tensor) -> str | None:
    """Return how far an answer is off; None if at most twice as far from fp32 as the model's own."""
    if not ours.shape == own.shape == truth.shape:
        return f"its answer is {tuple(own.shape)}, the engine's {tuple(ours.shape)}"
    flat = [_constant(x) for x in (ours, own, truth)]
    found, allowed = (int((x != flat[2]).sum()) for x in flat[:2])
    if found > FACTOR * allowed:
        return f"{found} classes are selected otherwise than in fp32"
    keep = ~(flat[0] | flat[1] | flat[2])
    x, y, exact = (z.to(truth.dtype)[keep] for z in (ours, own, truth))
    if not torch.equal(x.isfinite(), y.isfinite()):
        return "other values are infinite or NaN"
    finite = x.isfinite() & exact.isfinite()
    errors = [z[finite] - exact[finite] for z in (x, y)]
    least = LEAST.get(own.dtype, 0.0) * _spread(exact[finite])
    for measure in (_largest, _root_mean_square):
        error, most = map(measure, errors)
        if not error <= max(FACTOR * most, least):
            return f"error {error:.1e}, of the model's own code {most:.1e}, both against fp32"
    return None


def _comparable(ours: Tensor, own: Tensor) -> tuple[Tensor, Tensor] | str:
    """Return both without maps of a single value, such as those of dropped classes, and without NaN.

    Such a value can be so large that no difference would be seen beside it.
    """
    flat, ours = _constant(own), ours.to(own.dtype)
    if not torch.equal(flat, _constant(ours)):
        return f"other classes are dropped, in {int((flat != _constant(ours)).sum())} maps"
    if not torch.allclose(ours[flat], own[flat], rtol=1e-4, atol=1e-6, equal_nan=True):
        return "dropped classes get another value"
    x, y = ours[~flat], own[~flat]
    if not torch.equal(x.isnan(), y.isnan()) or not torch.equal(x.isinf(), y.isinf()):
        return "other values are infinite or NaN"
    finite = y.isfinite()
    return x[finite], y[finite]


def _constant(logits: Tensor) -> Tensor:
    """Return which maps `[B, T]` have a single value among logits `[B, T, H, W]`; none in other tensors."""
    if logits.ndim != 4:
        return torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return (logits == logits[..., :1, :1]).flatten(2).all(dim=-1)


def _spread(x: Tensor) -> float:
    """Return the scale of differences: the standard deviation, or a small positive number."""
    if x.numel() < 2:
        return max(_largest(x), 1e-30)
    return max(x.std().item(), 1e-2 * _largest(x), 1e-30)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0
