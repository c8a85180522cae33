"""Alterations that show only in some calls, or for some values, under `accelerate`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from catseg_fast import accelerate
from support.odd_alterations import NOISY, ODD
from support.upstream_like import assert_equal, make_aggregator, make_inputs

# T, B, and the factor of features and guidance.
CALLS = ((2, 1, 1.0), (2, 1, 200.0), (2, 1, 0.001), (7, 2, 1.0), (4, 3, 1.0))

pytestmark = pytest.mark.filterwarnings("ignore:model:RuntimeWarning")


def scaled(batch: tuple[Tensor, Tensor, list[Tensor]], factor: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    image, text, guidance = batch
    return factor * image, text, [factor * x for x in guidance]


@torch.no_grad()
@pytest.mark.parametrize("name", ODD)
def test_odd_maths_is_never_answered_for(name: str) -> None:
    aggregator = make_aggregator(pooling_size=(2, 2))
    ODD[name](aggregator)
    own = copy.deepcopy(aggregator)
    accelerate(aggregator)
    for classes, crops, factor in CALLS:
        batch = scaled(make_inputs(classes, crops), factor)
        assert_equal(aggregator(*batch), own(*batch), (classes, crops, factor))
    image, text, guidance = batch = make_inputs(3, 2)
    alike = image.flatten(2)[:, :, :3].transpose(1, 2)[:, :, None].expand(-1, -1, 2, -1).contiguous()
    first = image * (torch.arange(24) < 12).view(-1, 1, 1)  # to whose channels the last 12 are orthogonal
    for features, words in ((image, text), (image, alike), (first, text * (torch.arange(24) >= 12))):
        assert_equal(aggregator(features, words, guidance), own(features, words, guidance), "other scores")
    with torch.inference_mode():
        assert_equal(aggregator(*batch), own(*batch), "inference mode")


@torch.no_grad()
@pytest.mark.parametrize("name", NOISY)
def test_noise_is_kept(name: str) -> None:
    aggregator = make_aggregator()
    NOISY[name](aggregator)
    accelerate(aggregator)
    first, second, third = (aggregator(*make_inputs(3, 2)) for _ in range(3))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
