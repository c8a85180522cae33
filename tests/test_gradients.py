"""Gradients through the engine: against the reference and finite differences, kept or computed again."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catseg_fast import backend, reference
from catseg_fast.engine import engine
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.gradients import ChunkState, GradientStream
from support.aggregators import PUBLISHED, H, W, features, make_aggregator
from support.live_bytes import LiveBytes


def gradients(model: Any, inputs: Any, weight: Tensor) -> list[Tensor | None]:
    """Return gradients of inputs and parameters; `model` is the reference, or an engine with a limit."""
    image, text, guidance = inputs
    leaves = [image, text[:1].clone(), *guidance]
    for leaf in leaves:
        leaf.requires_grad_()
    text = leaves[1].expand(len(image), -1, -1, -1)
    aggregator = getattr(model, "aggregator", model)
    if isinstance(model, Engine):
        output = model.logits(image, text, guidance, aggregator.max_classes)
    else:
        output = model(image, text, guidance)
    every = [*leaves, *aggregator.parameters()]
    return list(torch.autograd.grad((output * weight).sum(), every, allow_unused=True))


def make_engine(aggregator: reference.Aggregator, checkpoint: bool, chunk: int | None = 2) -> Engine:
    made = Engine(aggregator)
    made.checkpoint, made.chunk = checkpoint, chunk
    return made


def compare(ours: list[Tensor | None], theirs: list[Tensor | None], tolerance: float) -> None:
    """Compare within `tolerance` of the larger norm; terms that a softmax cancels have almost no gradient."""
    assert sum(x is not None for x in theirs) > 80
    for a, b in zip(ours, theirs, strict=True):
        if a is None:
            assert b is None or b.abs().max() < 1e-11
            continue
        assert b is not None
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-12


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("limit", "pooling", "attention"), [(None, (2, 2), "linear"), (3, (1, 1), "linear"), (None, None, "full")]
)
def test_are_the_references(checkpoint: bool, limit: Any, pooling: Any, attention: str) -> None:
    # Five classes: padded to twelve, or the best three of each crop.
    aggregator = make_aggregator(pooling_size=pooling, attention_type=attention, pad_len=12)
    aggregator.max_classes = limit
    inputs = features(aggregator)
    weight = torch.randn(2, 5, 4 * H, 4 * W, dtype=torch.float64)
    expected = gradients(aggregator, inputs, weight)
    compare(gradients(make_engine(aggregator, checkpoint), inputs, weight), expected, 1e-9)


@pytest.mark.parametrize("limit", [None, 2])
def test_are_those_of_finite_differences(limit: int | None) -> None:
    aggregator = make_aggregator(feature_resolution=(8, 8), window_size=4, pooling_size=(2, 2), pad_len=5)
    aggregator.max_classes = limit
    made = make_engine(aggregator, checkpoint=True)
    image, text, guidance = features(aggregator, 3, 1, (8, 8))

    def call(*leaves: Tensor) -> Tensor:
        return made.logits(leaves[0], leaves[1], leaves[2:], limit)

    leaves = [x.requires_grad_() for x in (image, text, *guidance)]
    # The text guidance ends in a ReLU: small steps stay on one side of it.
    assert torch.autograd.gradcheck(call, leaves, eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_computed_again_they_are_the_same_to_the_bit() -> None:
    aggregator = make_aggregator(pooling_size=(2, 2))
    inputs = features(aggregator)
    weight = torch.randn(2, 5, 4 * H, 4 * W, dtype=torch.float64)
    kept = gradients(make_engine(aggregator, checkpoint=False), inputs, weight)
    again = gradients(make_engine(aggregator, checkpoint=True), inputs, weight)
    for a, b in zip(kept, again, strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_at_the_real_size_in_fp32() -> None:
    """ReLU's inputs are far from 0, as a changed sign moves a gradient of 1e6 terms by 1e-3."""
    aggregator = make_aggregator(
        hidden_dim=128, nheads=4, decoder_dims=(64, 32), pooling_size=(2, 2), pad_len=4, **PUBLISHED
    )
    with torch.no_grad():
        for norm in (module for module in aggregator.modules() if isinstance(module, nn.GroupNorm)):
            norm.weight.mul_(0.1)
            norm.bias.copy_(torch.tensor([1.0, -1.0]).repeat(len(norm.bias) // 2))
    inputs = features(aggregator, 3, 1, (24, 24))
    weight = torch.randn(1, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = gradients(aggregator, inputs, weight)
    aggregator.float()
    image, text, guidance = (
        x.detach().float() if isinstance(x, Tensor) else [y.detach().float() for y in x] for x in inputs
    )
    ours = gradients(make_engine(aggregator, checkpoint=True), (image, text, guidance), weight.float())
    compare(ours, truth, 2e-4)


def peak(model: Any, classes: int) -> int:
    """Return the most bytes held in one step, forward and backward, above weights and inputs."""
    aggregator = getattr(model, "aggregator", model)
    inputs = features(aggregator, classes, 1, (24, 24))
    with LiveBytes() as counter:
        gradients(model, inputs, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    return counter.peak


def test_memory_hardly_grows_with_the_classes() -> None:
    aggregator = make_aggregator(pooling_size=(2, 2), pad_len=0, **PUBLISHED)
    made = make_engine(aggregator, checkpoint=True)
    few, many = peak(made, 4), peak(made, 14)
    assert many <= peak(aggregator, 14) / 2
    assert many <= peak(make_engine(aggregator, checkpoint=False), 14) / 2
    # A class's state after each layer, its gradient, logits, their gradient, and twice the caller's product.
    state, logits = 8 * 576 * aggregator.hidden_dim, 8 * 96 * 96
    assert (many - few) / 10 <= 1.1 * ((len(aggregator.layers) + 1) * state + 4 * logits)


def test_a_call_without_a_backward_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []

    class Watched(GradientStream):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            streams.append(weakref.ref(self))

    monkeypatch.setattr(engine, "GradientStream", Watched)
    aggregator = make_aggregator()
    made = make_engine(aggregator, checkpoint=True)
    inputs = features(aggregator)
    output = made.logits(*inputs, None)
    assert streams[0]() is not None  # what is computed again needs it
    del output
    gc.collect()
    assert streams[0]() is None


def test_triton_has_no_backward_and_says_so_once() -> None:
    aggregator = make_aggregator()
    made = make_engine(aggregator, checkpoint=False)
    made.backend = "triton"
    backend.warn_once.cache_clear()
    image, text, guidance = features(aggregator, 1, 1)
    with pytest.warns(
        RuntimeWarning, match="running in torch, as Triton's kernels have no backward"
    ) as caught:
        first, second = (made.logits(image, text, guidance, None) for _ in range(2))
    assert len(caught) == 1
    assert torch.equal(first, second)
    assert first.requires_grad


def test_the_budget_decides_what_is_computed_again() -> None:
    made = Engine(make_aggregator())
    ample = made.schedule(2, (24, 24), 50)
    assert (ample.policy, ample.reason) == ("keep", "the activations of 50 classes fit")
    made.memory_budget = ample.total_bytes - 1
    tight = made.schedule(2, (24, 24), 50)
    assert tight.policy == "checkpoint"
    assert tight.total_bytes <= made.memory_budget
    made.checkpoint = False
    with pytest.raises(ValueError, match="does not hold the activations of 50 classes"):
        made.schedule(2, (24, 24), 50)
    made.checkpoint, made.memory_budget = None, "1MiB"
    with pytest.raises(ValueError, match=r"memory_budget: 1.0 MiB does not hold 1 of 50 .* \((\d+) bytes\)"):
        made.schedule(2, (24, 24), 50)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_planner_knows_how_much_a_class_takes(checkpoint: bool) -> None:
    aggregator = make_aggregator(pooling_size=(2, 2), pad_len=0)
    made = make_engine(aggregator, checkpoint)
    schedule = made.schedule(1, (24, 24), 10)
    assert 0.5 * schedule.total_bytes <= peak(made, 10) <= 1.2 * schedule.total_bytes


def test_chunks_may_shrink_from_pass_to_pass() -> None:
    state, x = ChunkState(), torch.arange(6.0).view(1, 6, 1, 1)
    every = slice(0, 1)
    state.save(slice(0, 4), x[:, :4])
    state.save(slice(4, 6), x[:, 4:])
    for start, stop in ((0, 2), (2, 4), (4, 6)):
        part = slice(start, stop)
        loaded = state.load(every, part)
        assert torch.equal(loaded, x[:, part])
        state.save(part, loaded + 10)
    assert torch.equal(state.load(every, slice(1, 6)), x[:, 1:] + 10)
