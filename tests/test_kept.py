"""Values that are kept from call to call, and values that are not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from catseg_fast.engine.kept import MOST, kept

CPU = torch.device("cpu")


class Owner:
    pass


@torch.no_grad()
def test_made_once_per_owner_and_key() -> None:
    made: list[object] = []

    def make(name: object) -> object:
        made.append(name)
        return torch.ones(1)

    first, second = Owner(), Owner()
    for owner in (first, second):
        for key in (1, 2, 1, 2):
            kept(owner, key, CPU, lambda owner=owner, key=key: make((owner, key)))
    assert made == [(first, 1), (first, 2), (second, 1), (second, 2)]


def test_gradients_are_never_kept() -> None:
    owner, weight = Owner(), torch.ones(2, requires_grad=True)
    assert kept(owner, 0, CPU, lambda: weight * 2).requires_grad
    with torch.no_grad():
        assert not kept(owner, 0, CPU, lambda: weight * 2).requires_grad
    assert kept(owner, 0, CPU, lambda: weight * 2).requires_grad


def test_what_inference_mode_made_serves_other_modes() -> None:
    owner = Owner()
    with torch.inference_mode():
        value = kept(owner, 0, CPU, lambda: torch.ones(1) * 2)
    assert not value.is_inference()


@torch.no_grad()
def test_values_go_with_their_owner_and_are_bounded() -> None:
    owner = Owner()
    values = [kept(owner, key, CPU, Owner) for key in range(MOST + 1)]
    assert kept(owner, MOST, CPU, Owner) is values[MOST]
    assert kept(owner, 0, CPU, Owner) is not values[0]

    alive = weakref.ref(kept(owner, 0, CPU, Owner))
    del owner, values
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_traced_graph_computes_its_own(backend: str) -> None:
    owner, weight = Owner(), torch.ones(2)

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + kept(owner, 0, CPU, lambda: weight * 2)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert compiled(torch.zeros(2)).tolist() == [2, 2]
        weight.mul_(3)
        assert compiled(torch.zeros(2)).tolist() == [6, 6]
