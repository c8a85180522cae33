"""The accuracy rule for kernels: an error against float64 of at most twice plain torch's in the same type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from catseg_fast.kernels.launch.op import Op  # triton exists for Linux only


def upcast(item: Any) -> Any:
    """Convert every floating tensor in nested structures to float64."""
    if isinstance(item, Tensor):
        return item.double() if item.is_floating_point() else item
    if isinstance(item, (tuple, list)):
        return type(item)(upcast(x) for x in item)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **{field.name: upcast(getattr(item, field.name)) for field in fields(item)})
    return item


def assert_no_worse_than_eager(ours: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """Check that largest and root-mean-square error are at most `factor` times those of `eager`."""
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


def assert_matches_its_plain_form(op: Op, inputs: dict[str, Any]) -> None:
    """Hold all results of an op to the rule; labels may differ where two scores are nearly equal."""
    assert_near_the_plain_form(op.triton(**inputs), op, inputs, equal_labels=0.999)


def assert_near_the_plain_form(result: Any, op: Op, inputs: dict[str, Any], equal_labels: float) -> None:
    """Hold a result to the rule, as that of an op with these inputs; `equal_labels` is their least share."""
    truth = op.plain(**{name: upcast(value) for name, value in inputs.items()})
    for ours, eager, exact in zip(*map(parts, (result, op.plain(**inputs), truth)), strict=True):
        if ours.is_floating_point():
            assert_no_worse_than_eager(ours, eager, exact.double())
        else:
            assert (ours == exact).float().mean() >= equal_labels


def parts(result: Any) -> tuple[Tensor, ...]:
    """The results of an op, one or several."""
    return result if isinstance(result, tuple) else (result,)


def assert_classes_are_apart(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Check that two runs agree in every bit, and that no class of `x [B, t, ...]` changes a bit of another.

    Each class keeps its place: how a matrix product rounds a row can depend on the row's place in the tile.
    """
    out = op(x)
    assert torch.equal(op(x), out), "two runs differ"
    for index in range(x.shape[1]):
        changed = x.clone()
        changed[:, index] *= -3
        after, others = op(changed), torch.arange(x.shape[1], device=x.device) != index
        assert not torch.equal(after[:, index], out[:, index]), f"class {index} does not depend on its input"
        assert torch.equal(after[:, others], out[:, others]), f"class {index} changes other classes"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise unless two state dicts have the same tensors, of the same types."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
