"""Altered aggregators under `accelerate` in fp16 and bf16, by the rule of twice the model's own error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from catseg_fast import accelerate
from support.alterations import EQUAL, OTHER
from support.upstream_like import make_aggregator, make_inputs

# T and B; upstream's selection of classes does not run in 16 bits.
CALLS = {torch.float16: (2, 2), torch.bfloat16: (4, 1)}

pytestmark = pytest.mark.filterwarnings("ignore:model:RuntimeWarning")


def assert_no_worse(answer: Tensor, own: Tensor, truth: Tensor) -> None:
    """Check the error against fp32: at most twice the model's own, or within the rounding of one number."""
    assert answer.dtype == own.dtype
    found, allowed = ((x.float() - truth).square().mean().sqrt() for x in (answer, own))
    least = torch.finfo(own.dtype).eps * truth.abs().max()
    assert found <= torch.maximum(2 * allowed, least)


@torch.no_grad()
@pytest.mark.parametrize("name", [*list(EQUAL)[:8:2], *OTHER])
def test_never_wrong_in_16_bits(name: str) -> None:
    aggregator = make_aggregator()
    {**EQUAL, **OTHER}[name](aggregator)
    accelerated = aggregator.to(torch.float16)
    accelerate(accelerated)
    for dtype, (classes, crops) in CALLS.items():
        accelerated.to(dtype)
        own = copy.deepcopy(accelerated)
        batch = make_inputs(classes, crops, dtype=dtype)
        expected = own(*batch)
        truth = own.float()(*(x.float() if isinstance(x, Tensor) else [y.float() for y in x] for x in batch))
        for _ in range(2):
            assert_no_worse(accelerated(*batch), expected, truth)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_answers_type(dtype: torch.dtype) -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    accelerate(aggregator)
    batch = make_inputs(3, 2)
    truth = own(*batch)
    with torch.autocast("cpu", dtype=dtype):
        expected = own(*batch)
        assert expected.dtype == dtype
        for _ in range(2):
            assert_no_worse(aggregator(*batch), expected, truth)
    torch.testing.assert_close([aggregator(*batch) for _ in range(2)][1], truth, rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_selection_of_classes_runs_where_upstreams_does_not(dtype: torch.dtype) -> None:
    aggregator = make_aggregator()
    truth = copy.deepcopy(aggregator)(*make_inputs(9, 2))
    own = copy.deepcopy(aggregator).to(dtype)
    accelerate(aggregator.to(dtype))
    batch = make_inputs(9, 2, dtype=dtype)
    with pytest.raises(RuntimeError, match="dtype"):
        own(*batch)
    for _ in range(2):
        answer = aggregator(*batch).float()
        kept = (answer > -100) & (truth > -100)
        assert kept.float().mean() > 0.3
        assert (answer - truth)[kept].square().mean().sqrt() < 0.05 * truth[kept].std()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_runs_in_no_type_raises_the_models_own_error(dtype: torch.dtype) -> None:
    aggregator = make_aggregator()
    OTHER["doubled"](aggregator)  # whose parts run in the engine
    accelerate(aggregator.to(dtype))
    with pytest.raises(RuntimeError, match="dtype"):
        aggregator(*make_inputs(9, 2, dtype=dtype))
