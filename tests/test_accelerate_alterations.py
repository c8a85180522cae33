"""Altered aggregators under `accelerate`: refused, or equal, or equal by falling back; never wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from catseg_fast import accelerate
from support.alterations import BEFORE, EQUAL, LATER, OTHER
from support.upstream_like import make_aggregator, make_inputs

# T from 1 to 3 x pad_len, B from 1 to 3.
CALLS = ((1, 1), (3, 3), (7, 2), (12, 1))

pytestmark = pytest.mark.filterwarnings("ignore:model:RuntimeWarning")


def assert_equal(answer: Tensor, expected: Tensor, where: object) -> None:
    """Check that answers agree but for rounding in fp32."""
    assert answer.shape == expected.shape
    assert answer.dtype == expected.dtype
    kept = expected > -100
    assert torch.equal(answer > -100, kept), f"{where}: other classes are dropped"
    error = (answer - expected)[kept].abs().max() / expected[kept].std().clamp_min(1e-3)
    assert error < 3e-5, f"{where}: error {error:.2g}"


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
    assert all(verdict.reason for part in whole for verdict in part.verdicts.values() if verdict.reason)
    assert name in NOT_AT_ONCE or not whole


# Of these the copy's few classes show nothing: the first call of a kind does.
NOT_AT_ONCE = {
    "many classes attended otherwise",
    "many classes otherwise",
    "single class apart",
    "counts its calls",
}


@torch.no_grad()
@pytest.mark.parametrize("name", LATER)
def test_what_changes_later_is_noticed(name: str) -> None:
    aggregator = make_aggregator()
    BEFORE.get(name, lambda a: None)(aggregator)
    accelerate(aggregator)
    batch = make_inputs(7, 2)
    before = [aggregator(*batch) for _ in range(3)][-1]
    LATER[name](aggregator)
    own = copy.deepcopy(aggregator)
    if name == "double":
        batch = (batch[0].double(), batch[1].double(), [x.double() for x in batch[2]])
        with pytest.raises(RuntimeError, match="dtype"):
            own(*batch)  # upstream's selection mixes types
        batch = (batch[0][:, :], batch[1][:, :3], batch[2])
        assert_equal(aggregator(*batch), own(*batch), name)
        return
    expected = own(*batch)
    assert (expected - before)[before > -100].abs().max() > 1e-3, "the change changes nothing"
    for call in range(3):
        assert_equal(aggregator(*batch), expected, call)
