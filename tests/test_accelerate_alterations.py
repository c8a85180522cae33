"""Altered aggregators under `accelerate`: refused, or equal, or equal by falling back; never wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from catseg_fast import accelerate
from support.alterations import EQUAL, OTHER, override, resized
from support.upstream_like import assert_equal, make_aggregator, make_inputs

# T from 1 to 3 x pad_len, B from 1 to 3.
CALLS = ((1, 3), (3, 1), (12, 2))

pytestmark = pytest.mark.filterwarnings("ignore:model:RuntimeWarning")


def answers_agree(aggregator: nn.Module, own: nn.Module, resolution: tuple[int, int]) -> None:
    for classes, crops in CALLS:
        batch = make_inputs(classes, crops, resolution)
        expected = own(*batch)
        for call in range(2):
            assert_equal(aggregator(*batch), expected, (classes, crops, call))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "resolution"),
    [*((name, (8, 8)) for name in EQUAL), ("nothing", (8, 12)), ("pruned", (12, 8))],
    ids=str,
)
def test_the_same_maths_runs_in_the_engine(name: str, resolution: tuple[int, int]) -> None:
    aggregator = make_aggregator(feature_resolution=resolution)
    EQUAL[name](aggregator)
    own = copy.deepcopy(aggregator)
    acceleration = accelerate(aggregator)
    answers_agree(aggregator, own, resolution)
    assert (
        acceleration.explain() == f"the model (aggregator): the engine; {len(CALLS)} kinds of input compared"
    )


@torch.no_grad()
@pytest.mark.parametrize("name", OTHER)
def test_other_maths_is_never_answered_for(name: str) -> None:
    aggregator = make_aggregator(pooling_size=(2, 2))
    OTHER[name](aggregator)
    own = copy.deepcopy(aggregator)
    acceleration = accelerate(aggregator)
    answers_agree(aggregator, own, (8, 8))
    whole = [part for part in acceleration.parts if part.kind == "aggregator"]
    assert name in NOT_AT_ONCE or not whole


@torch.no_grad()
def test_code_that_resizes_its_input_answers_itself() -> None:
    """At the resolution that the code resizes to, it computes what the engine does; at others it does not."""
    aggregator = make_aggregator()
    override(aggregator, forward=resized)
    own = copy.deepcopy(aggregator)
    accelerate(aggregator)
    for resolution in ((8, 8), (16, 16), (8, 8)):
        answers_agree(aggregator, own, resolution)


# Of these the copy's few classes show nothing: the first call of a kind does.
NOT_AT_ONCE = {
    "many classes attended otherwise",
    "many classes otherwise",
    "single class apart",
    "counts its calls",
}
