"""The engine against the reference: policies, chunk sizes, vocabularies, types, gradients, failures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from catseg_fast import reference
from catseg_fast.engine import engine as engine_module
from catseg_fast.engine import schedule as schedule_module
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.precision import pays_off_on_cpu
from catseg_fast.engine.schedule import Sizes, parse_bytes
from support.aggregators import H, W, chunk, features, make_aggregator, terms

POLICIES = ("resident", "offload", "recompute")
T = 7


def logits(
    aggregator: reference.Aggregator, inputs: Any, max_classes: int | None = None, **choices: Any
) -> Tensor:
    engine = Engine(aggregator)
    for name, value in choices.items():
        setattr(engine, name, value)
    return engine.logits(*inputs, max_classes)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["linear", "full"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("step", [1, 3, T, T + 5])
def test_policies_and_chunks_change_nothing(policy: str, step: int, attention: str) -> None:
    aggregator = make_aggregator(attention_type=attention)
    exact = aggregator(*features(aggregator, T))
    double = logits(aggregator, features(aggregator, T), policy=policy, chunk=step)
    torch.testing.assert_close(double, exact, rtol=1e-11, atol=1e-11)

    aggregator.float()
    inputs = [x.float() if isinstance(x, Tensor) else [y.float() for y in x] for x in features(aggregator, T)]
    whole = logits(aggregator, inputs, policy="resident", chunk=T)
    assert relative_error(logits(aggregator, inputs, policy=policy, chunk=step), whole) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("limit", [1, 4, T - 1])
def test_selected_classes(policy: str, limit: int) -> None:
    aggregator = make_aggregator()
    inputs = features(aggregator, T)
    aggregator.max_classes = limit
    expected = aggregator(*inputs)
    assert (expected == -100).flatten(2).all(-1).sum(dim=1).tolist() == [T - limit] * 2
    actual = logits(aggregator, inputs, limit, policy=policy, chunk=2)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_limit_that_is_not_reached_selects_nothing() -> None:
    aggregator = make_aggregator()
    inputs = features(aggregator, T)
    aggregator.max_classes = None
    expected = aggregator(*inputs)
    for limit in (None, T, T + 1):
        torch.testing.assert_close(logits(aggregator, inputs, limit), expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    crops=st.integers(1, 3),
    classes=st.integers(1, 9),
    prompts=st.integers(1, 3),
    layers=st.integers(1, 3),
    pooling=st.sampled_from([None, (1, 1), (2, 2), (3, 2), (5, 5)]),
    pad_len=st.sampled_from([0, 3, 12]),
    limit=st.sampled_from([None, 2, 5]),
    step=st.integers(1, 10),
    policy=st.sampled_from(POLICIES),
    attention=st.sampled_from(["linear", "full"]),
)
@torch.no_grad()
def test_any_combination(
    crops: int, classes: int, prompts: int, layers: int, pooling: Any, pad_len: int, limit: int | None,
    step: int, policy: str, attention: str,
) -> None:  # fmt: skip
    aggregator = make_aggregator(
        prompt_channel=prompts, num_layers=layers, pooling_size=pooling, pad_len=pad_len,
        attention_type=attention,
    )  # fmt: skip
    inputs = features(aggregator, classes, crops)
    aggregator.max_classes = limit
    actual = logits(aggregator, inputs, limit, policy=policy, chunk=step)
    torch.testing.assert_close(actual, aggregator(*inputs), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 7])
def test_no_worse_than_the_reference_at_the_same_type(dtype: torch.dtype, classes: int) -> None:
    """Our error against float64 is at most twice that of the reference in the same type."""
    aggregator = make_aggregator(pad_len=16)
    inputs = features(aggregator, classes)
    truth = aggregator(*inputs)
    low = [x.to(dtype) if isinstance(x, Tensor) else [y.to(dtype) for y in x] for x in inputs]
    aggregator.to(dtype)
    eager = (aggregator(*low).double() - truth).square().mean().sqrt()
    ours = (logits(aggregator, low, chunk=3).double() - truth).square().mean().sqrt()
    assert ours <= 2 * eager


@torch.no_grad()
@pytest.mark.parametrize("pays_off", [True, False])
def test_precision_and_autocast_choose_the_stages_type(
    pays_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catseg_fast.engine.precision.pays_off_on_cpu", lambda dtype: pays_off)
    aggregator = make_aggregator().float()
    inputs = [x.float() if isinstance(x, Tensor) else [y.float() for y in x] for x in features(aggregator)]
    full = logits(aggregator, inputs)
    half = logits(aggregator, inputs, precision=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = logits(aggregator, inputs)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(autocast, half if pays_off else full)
    assert autocast.dtype == (half if pays_off else full).dtype
    assert 1e-6 < relative_error(half.float(), full) < 0.1


@torch.no_grad()
def test_what_overflows_fp16_is_computed_again_in_bf16() -> None:
    aggregator = make_aggregator().float()
    aggregator.decoder1.conv.double_conv[0].weight *= 1e6  # before a normalisation
    inputs = [x.float() if isinstance(x, Tensor) else [y.float() for y in x] for x in features(aggregator)]
    expected = logits(aggregator, inputs, precision=torch.bfloat16, chunk=2)
    with pytest.warns(RuntimeWarning, match="fp16 overflowed: computing again in bf16") as caught:
        actual = logits(aggregator, inputs, precision=torch.float16, chunk=2)
    assert len(caught) == 1
    assert expected.isfinite().all()
    assert torch.equal(actual, expected.half())


@torch.no_grad()
def test_what_is_not_a_number_before_fp16_is_not_computed_again(recwarn: pytest.WarningsRecorder) -> None:
    aggregator = make_aggregator().float()
    image, text, guidance = features(aggregator)
    image[0, 0, 0, 0] = math.nan
    inputs = (image.float(), text.float(), [x.float() for x in guidance])
    actual = logits(aggregator, inputs, precision=torch.float16)
    assert actual[0].isnan().all()
    assert actual[1].isfinite().all()
    assert not recwarn


@torch.no_grad()
@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("policy", ["resident", "recompute"])  # CUDA streams cannot be traced
def test_a_call_compiles_into_one_graph(policy: str, limit: int | None) -> None:
    aggregator = make_aggregator()
    aggregator.max_classes = limit
    engine = Engine(aggregator)
    engine.policy = policy
    inputs = features(aggregator, 3)
    compiled = torch.compile(lambda *x: engine.logits(*x, limit), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), aggregator(*inputs), rtol=1e-11, atol=1e-11)


def test_a_type_must_be_faster_on_this_cpu() -> None:
    assert not pays_off_on_cpu(torch.float64)


@pytest.mark.parametrize("limit", [None, 3])
def test_gradients_are_the_references(limit: int | None) -> None:
    aggregator = make_aggregator(pooling_size=(2, 2))
    aggregator.max_classes = limit
    image, text, guidance = features(aggregator)
    leaves = [image.requires_grad_(), *(x.requires_grad_() for x in guidance)]
    weight = torch.randn(2, 5, 4 * H, 4 * W, dtype=torch.float64)

    def gradients(output: Tensor) -> list[Tensor | None]:
        parameters = list(aggregator.parameters())
        return list(torch.autograd.grad((output * weight).sum(), [*leaves, *parameters], allow_unused=True))

    expected = gradients(aggregator(image, text, guidance))
    actual = gradients(logits(aggregator, (image, text, guidance), limit, chunk=2))
    assert sum(x is not None for x in expected) > 80
    for ours, theirs in zip(actual, expected, strict=True):
        if ours is None or theirs is None:  # terms that the softmax cancels have a gradient of zero, or none
            assert all(x is None or x.abs().max() < 1e-11 for x in (ours, theirs))
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_chunk_step_compiles_without_graph_breaks() -> None:
    aggregator = make_aggregator()
    engine = Engine(aggregator)
    plan = engine.plan()
    _, image, _ = terms(aggregator)
    x = chunk(2, 3, H * W, 32)
    layer = plan.layers[0].classes

    def class_attention(x: Tensor) -> Tensor:
        memory = new_memory(layer, 3)
        stages.class_collect(layer, memory, x, None, (H, W), last=True)
        return stages.class_apply(layer, x, None, memory, (H, W))

    for stage in (
        class_attention,
        lambda x: stages.window_block(plan.layers[0].blocks[1], image.blocks[0][1], x),
        lambda x: stages.decode(plan, image.decoder, x, (H, W)),
    ):
        compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), stage(x), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_not_a_number_propagates_as_in_the_reference() -> None:
    aggregator = make_aggregator()
    image, text, guidance = features(aggregator)
    image[0, 3, 4, 5] = math.nan
    expected = aggregator(image, text, guidance)
    actual = logits(aggregator, (image, text, guidance), chunk=2)
    assert expected[0].isnan().any()
    assert not expected[1].isnan().any()
    assert torch.equal(actual.isnan(), expected.isnan())


@torch.no_grad()
@pytest.mark.parametrize("stage", ["window_block", "class_apply", "class_collect", "decode"])
def test_out_of_memory_goes_on_with_smaller_steps(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator = make_aggregator()
    inputs = features(aggregator, T)
    expected = aggregator(*inputs)
    original = getattr(stages, stage)

    def limited(*args: Any) -> Any:
        if next(x for x in args if isinstance(x, Tensor) and x.ndim == 4).shape[1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args)

    monkeypatch.setattr(stages, stage, limited)
    with pytest.warns(
        RuntimeWarning, match="out of memory with 7 classes per step: continuing with fewer"
    ) as caught:
        actual = logits(aggregator, inputs, chunk=T)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert len(caught) == 1


@torch.no_grad()
def test_an_error_in_the_middle_leaves_the_next_call_right(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator = make_aggregator()
    inputs = features(aggregator, T)
    engine = Engine(aggregator)
    engine.chunk = 2
    expected = engine.logits(*inputs, None)
    calls = iter(range(100))
    original = stages.class_apply

    def failing(*args: Any) -> Tensor:
        if next(calls) == 2:
            raise RuntimeError("no luck")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "class_apply", failing)
        with pytest.raises(RuntimeError, match="no luck"):
            engine.logits(*inputs, None)
    assert torch.equal(engine.logits(*inputs, None), expected)


@torch.no_grad()
def test_running_out_of_memory_with_one_class_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    aggregator = make_aggregator()
    monkeypatch.setattr(stages, "decode", never)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(RuntimeWarning):
        logits(aggregator, features(aggregator), chunk=2)


@torch.no_grad()
def test_a_budget_decides_the_policy_and_the_chunk() -> None:
    engine = Engine(make_aggregator())
    ample = engine.schedule(2, (24, 24), 1000)
    assert ample.policy == "resident"
    engine.memory_budget = ample.fixed_bytes
    tight = engine.schedule(2, (24, 24), 1000)
    assert tight.policy == "recompute"
    assert tight.total_bytes <= engine.memory_budget
    engine.memory_budget = "1 MiB"
    with pytest.raises(
        ValueError, match=r"memory_budget: 1.0 MiB does not hold .* \((\d+) bytes\)"
    ) as caught:
        engine.schedule(2, (24, 24), 1000)
    engine.memory_budget = least = int(str(caught.value).rpartition("(")[2].split()[0])
    assert engine.schedule(2, (24, 24), 1000).total_bytes <= least
    engine.memory_budget = least - 1
    with pytest.raises(ValueError, match="does not hold"):
        engine.schedule(2, (24, 24), 1000)


def test_bad_settings() -> None:
    engine = Engine(make_aggregator())
    for step in (0, -3):
        with pytest.raises(ValueError, match=rf"chunk: {step} is not positive"):
            engine.chunk = step
    with pytest.raises(ValueError, match="policy: 'fast' is not one of resident, offload, recompute"):
        engine.policy = "fast"
    for budget in (0, -1, "0GiB", "a lot", "5 parsecs", "-3GB"):
        with pytest.raises(ValueError, match="memory_budget"):
            engine.memory_budget = budget
    assert [parse_bytes(text) for text in ("2GiB", "1.5 gb", "500MB", "7", 12)] == [
        2**31, 1_500_000_000, 500_000_000, 7, 12,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value", "valid"),
    [
        ("backend", "tritn", "auto, triton, torch, reference"),
        ("precision", "fp16", "torch.float16, torch.bfloat16, torch.float32, torch.float64, or None"),
        ("precision", torch.int8, "torch.float16"),
        ("input_precision", "tf32x", "ieee, tf32x3, tf32"),
    ],
)
def test_settings_are_checked_where_they_are_set(setting: str, value: object, valid: str) -> None:
    engine = Engine(make_aggregator())
    before = getattr(engine, setting)
    with pytest.raises(ValueError, match=rf"{setting}: {value!r} is not one of .*{valid}"):
        setattr(engine, setting, value)
    assert getattr(engine, setting) == before


@torch.no_grad()
def test_terms_of_a_vocabulary_are_kept_while_text_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator = make_aggregator()
    engine = Engine(aggregator)
    image, text, guidance = features(aggregator, 3)
    made: list[object] = []
    compute = engine_module.vocabulary_terms
    monkeypatch.setattr(engine_module, "vocabulary_terms", lambda *args: made.append(args) or compute(*args))

    def check(expected: int, text: Tensor, limit: int | None = None) -> None:
        aggregator.max_classes = limit
        actual = engine.logits(image, text, guidance, limit)
        torch.testing.assert_close(actual, aggregator(image, text, guidance), rtol=1e-11, atol=1e-11)
        assert len(made) == expected

    check(1, text)
    check(1, text.view_as(text))  # another view of the same values
    check(2, text.clone())
    check(3, text)  # only the last ones are kept
    text[0].mul_(-1)
    check(4, text)
    aggregator.text_guidance_projection[0].weight.mul_(2)
    check(5, text)
    check(6, text, 2)
    check(6, text, 2)


def test_a_gpu_is_asked_for_free_memory_only_where_it_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(make_aggregator())
    asked: list[torch.device] = []
    free = 2**40
    monkeypatch.setattr(schedule_module, "free_bytes", lambda device: asked.append(device) or free)
    sizes = Sizes(engine.plan(), 2, (24, 24), 7, torch.device("cuda"))
    for _ in range(3):
        ample = engine._schedule(sizes, 0, differentiable=False)
    assert len(asked) == 1
    free = 2 * ample.total_bytes
    tight = replace(sizes, crops=3)
    for _ in range(3):
        engine._schedule(tight, 0, differentiable=False)
    assert len(asked) == 4
