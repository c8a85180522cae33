"""The rule that kernels are held to: against float64, at most twice plain torch's error in their type."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def upcast(item: Any) -> Any:
    """The same with every floating tensor in it, however deep, in float64."""
    if isinstance(item, Tensor):
        return item.double() if item.is_floating_point() else item
    if isinstance(item, (tuple, list)):
        return type(item)(upcast(x) for x in item)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **{field.name: upcast(getattr(item, field.name)) for field in fields(item)})
    return item


def assert_no_worse_than_eager(ours: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """Check largest and root-mean-square error against those of `eager`, both from `truth` in float64."""
    assert ours.shape == eager.shape == truth.shape
    assert ours.dtype == eager.dtype
    assert truth.dtype == torch.float64
    found, allowed = (x.double().sub(truth).abs() for x in (ours, eager))
    assert not found.isnan().any(), "some values are missing or not a number"
    assert allowed.max() > 0, "plain torch made no error: nothing to compare with"
    assert found.max() <= factor * allowed.max(), (
        f"largest error {found.max():.3g}; plain torch {allowed.max():.3g}"
    )
    ours_rms, eager_rms = found.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert ours_rms <= factor * eager_rms, (
        f"root-mean-square error {ours_rms:.3g}; plain torch {eager_rms:.3g}"
    )
