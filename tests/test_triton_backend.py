"""The whole aggregator and model on the Triton back end; without a GPU, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from catseg_fast import Aggregator, CATSeg, backend
from catseg_fast.backend import choose_backend, why_no_triton
from catseg_fast.engine.engine import Engine
from catseg_fast.kernels.class_attention import op as class_attention
from support.engines import DEVICE, make_engine, make_inputs_of
from support.golden_models import build_model, constructor_arguments, golden_image
from support.golden_rule import assert_output, fill, load_case, make_inputs

pytestmark = pytest.mark.skipif(why_no_triton(DEVICE) is not None, reason=str(why_no_triton(DEVICE)))


def in_torch(engine: Engine, *arguments: Any) -> Tensor:
    twin = Engine(engine.aggregator)
    twin.backend, twin.precision = "torch", torch.float32
    return twin.logits(*arguments)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("agg_v2_T1_C512", marks=pytest.mark.slow),
        "agg_v1_T7_noguidance",
        pytest.param("agg_v1_T1_p11", marks=pytest.mark.slow),
        pytest.param("agg_v2_T5_poolNone", marks=pytest.mark.slow),
        pytest.param("agg_v1_T2_P1_p22_L4", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_golden_aggregators(name: str) -> None:
    case = load_case(name)
    _, meta = case
    aggregator = Aggregator(**constructor_arguments(meta), backend="triton").eval()
    aggregator.engine.precision = torch.float32
    fill(aggregator, meta["prefix"], meta["seed"])
    inputs = {key: value.to(DEVICE) for key, value in make_inputs(meta).items()}
    guidance = [inputs.get(f"guidance{i}") for i in range(3)]
    logits = aggregator.to(DEVICE)(inputs["img_feats"], inputs["text_feats"], guidance)
    assert_output(case, "out", logits, floor=5e-6)


@pytest.mark.parametrize(
    "name",
    [
        "model_v2_small_p22",
        pytest.param("model_v1_T5", marks=pytest.mark.slow),
        pytest.param("model_v2_T5", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_golden_label_maps(name: str) -> None:
    _, meta = load_case(name)
    model = build_model(meta, CATSeg).to(DEVICE)
    image = golden_image(meta, make_inputs(meta))
    model.backend = "reference"
    expected = model.label_map([image])[0]
    model.backend, model.engine.precision = "triton", torch.float32
    actual = model.label_map([image])[0]
    assert (actual.labels == expected.labels).float().mean() >= 0.999
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", ["resident", "offload", "recompute"])
@torch.no_grad()
def test_streaming(policy: str) -> None:
    engine = make_engine(prompt_channel=2)
    inputs = make_inputs_of(engine.aggregator, 3, 2)
    engine.policy, engine.chunk = policy, 2
    expected = in_torch(engine, *inputs, 2)
    torch.testing.assert_close(engine.logits(*inputs, 2), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_twice_is_bitwise_equal_and_the_order_of_classes_is_nothing() -> None:
    engine = make_engine()
    image, text, guidance = make_inputs_of(engine.aggregator, 3)
    first, again = (engine.logits(image, text, guidance, None) for _ in range(2))
    assert torch.equal(first, again)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    permuted = engine.logits(image, text[:, order], guidance, None)
    torch.testing.assert_close(permuted, first[:, order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_call_compiles_into_one_graph() -> None:
    engine = make_engine()
    inputs = make_inputs_of(engine.aggregator, 2)
    expected = engine.logits(*inputs, None)
    compiled = torch.compile(lambda *x: engine.logits(*x, None), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_stage_without_a_kernel_falls_back() -> None:
    engine = make_engine(attention_type="full")
    inputs = make_inputs_of(engine.aggregator, 2)
    found = engine.stages(engine.plan()).fallbacks  # type: ignore[attr-defined]
    assert found == {"class_attention": "softmax attention over classes has no kernel"}
    torch.testing.assert_close(
        engine.logits(*inputs, None), in_torch(engine, *inputs, None), rtol=1e-4, atol=1e-5
    )


@pytest.fixture
def _does_not_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise triton.OutOfResources(300_000, 232_448, "shared memory")

    with monkeypatch.context() as patch:
        patch.setattr(class_attention, "class_apply", fail)
        yield


@pytest.mark.usefixtures("_does_not_compile")
@torch.no_grad()
def test_a_kernel_that_does_not_compile_falls_back_with_one_warning() -> None:
    engine = make_engine()
    inputs = make_inputs_of(engine.aggregator, 3)
    engine.chunk = 1
    reason = "class_attention runs in torch, because the Triton kernel fails: out of resource: shared memory"
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        logits = [engine.logits(*inputs, None) for _ in range(2)]
    assert len(caught) == 1
    for x in logits:
        torch.testing.assert_close(x, in_torch(engine, *inputs, None), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_does_not_compile")
@torch.no_grad()
def test_strict_makes_that_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATSEG_FAST_STRICT", "1")
    engine = make_engine()
    with pytest.raises(RuntimeError, match="class_attention: the Triton kernel fails: out of resource"):
        engine.logits(*make_inputs_of(engine.aggregator, 1), None)


def test_gradients_run_in_torch() -> None:
    engine = make_engine()
    engine.logits(*make_inputs_of(engine.aggregator, 2), None).sum().backward()
    layers = engine.aggregator.layers
    assert all(parameter.grad is not None for parameter in layers.parameters() if parameter.ndim > 1)


def test_auto_is_triton_on_a_gpu_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "why_no_triton", lambda device: None)
    assert choose_backend("auto", "cuda:1") == "triton"
    assert choose_backend("auto", "cpu") == "torch"
    assert choose_backend("torch", "cuda") == "torch"


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "why_no_triton", lambda device: "the GPU is a museum piece")
    with pytest.warns(RuntimeWarning, match="running in torch, not in Triton: the GPU is a museum") as caught:
        assert [choose_backend("auto", "cuda") for _ in range(2)] == ["torch", "torch"]
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="'triton' cannot run: the GPU is a museum piece"):
        choose_backend("triton", "cuda")
