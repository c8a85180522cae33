"""Changes of a model after `accelerate`: each is noticed at the next call."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from catseg_fast import accelerate
from support import upstream_layers, upstream_like
from support.later_alterations import BEFORE, LATER, Offset
from support.upstream_like import assert_equal, make_aggregator, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:model:RuntimeWarning")


@pytest.fixture(autouse=True)
def functions_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a change does to the module of the classes."""
    for owner, name in (
        (upstream_like, "cosines"),
        (upstream_layers, "F"),
        (F, "interpolate"),
        (nn.LayerNorm, "forward"),
        (Offset, "__call__"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    function, code = upstream_like.cosines, upstream_like.cosines.__code__
    yield
    function.__code__ = code


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
