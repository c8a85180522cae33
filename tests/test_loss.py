"""The training loss against the reference's: value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast import reference
from catseg_fast.engine import loss
from catseg_fast.engine.loss import segmentation_loss
from catseg_fast.reference.finetune import segmentation_loss as reference_loss


def make_batch(dtype: torch.dtype, ignore: int = 255) -> tuple[Tensor, Tensor]:
    """Return logits `[2, 5, 6, 7]`, some of them large or of dropped classes, and labels `[2, 13, 16]`."""
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64)
    logits[0, 3] = reference.aggregator.DROPPED_LOGIT
    labels = torch.randint(0, 5, (2, 13, 16), generator=generator)
    labels[:, :2] = ignore
    return logits.to(dtype), labels


def run(function: Any, logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = function(leaf, labels, ignore)
    (3 * value).backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.mark.parametrize("chunk_values", [1, 2 * 2 * 13 * 16, 2**20])
@pytest.mark.parametrize("ignore", [255, 2, 65535])
def test_is_the_references(chunk_values: int, ignore: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_VALUES, "cpu", chunk_values)
    logits, labels = make_batch(torch.float64, ignore)
    value, gradient = run(segmentation_loss, logits, labels, ignore)
    expected, expected_gradient = run(reference_loss, logits, labels, ignore)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_in_fp32_at_least(dtype: torch.dtype) -> None:
    logits, labels = make_batch(dtype)
    value, gradient = run(segmentation_loss, logits, labels, 255)
    expected, expected_gradient = run(reference_loss, logits.double(), labels, 255)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error <= 4 * torch.finfo(dtype).eps


def test_without_gradients_it_is_the_same() -> None:
    logits, labels = make_batch(torch.float64)
    assert torch.equal(segmentation_loss(logits, labels), run(segmentation_loss, logits, labels, 255)[0])
    with torch.inference_mode():
        segmentation_loss(logits, labels)


def test_what_is_not_a_number_stays_so() -> None:
    logits, labels = make_batch(torch.float32)
    logits[1, 2, 3, 4] = torch.nan
    assert segmentation_loss(logits, labels).isnan()


@pytest.mark.parametrize("label", [5, 254, -1, 256])
def test_bad_labels(label: int) -> None:
    logits, labels = make_batch(torch.float32)
    labels[0, 2, 1] = label
    with pytest.raises(ValueError, match=f"labels: {label} is not one of 5 classes or the ignore label 255"):
        segmentation_loss(logits, labels)
