"""The whole aggregator and model on the Triton back end; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from catseg_fast import Aggregator, CATSeg
from catseg_fast.backend import why_no_triton
from catseg_fast.engine import Engine
from golden_rule import assert_output, fill, load_case, make_inputs
from test_golden import build_model, constructor_arguments, golden_image
from test_plan import features, make_aggregator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.skipif(why_no_triton(DEVICE) is not None, reason=str(why_no_triton(DEVICE)))


@pytest.mark.parametrize(
    "name", ["agg_v1_T1_p11", "agg_v2_T1_C512", "agg_v2_T5_poolNone", "agg_v1_T2_P1_p22_L4"]
)
@torch.no_grad()
def test_golden_aggregators(name: str) -> None:
    case = load_case(name)
    _, meta = case
    aggregator = Aggregator(**constructor_arguments(meta), backend="triton").eval()
    fill(aggregator, meta["prefix"], meta["seed"])
    inputs = {key: value.to(DEVICE) for key, value in make_inputs(meta).items()}
    guidance = [inputs.get(f"guidance{i}") for i in range(3)]
    logits = aggregator.to(DEVICE)(inputs["img_feats"], inputs["text_feats"], guidance)
    assert_output(case, "out", logits, floor=5e-6)


@torch.no_grad()
def test_golden_label_map() -> None:
    _, meta = load_case("model_v2_small_p22")
    model = build_model(meta, CATSeg).to(DEVICE)
    image = golden_image(meta, make_inputs(meta))
    model.backend = "reference"
    expected = model.label_map([image])[0]
    model.backend = "triton"
    assert "triton" in model.explain()
    actual = model.label_map([image])[0]
    assert (actual.labels == expected.labels).float().mean() >= 0.999
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", ["resident", "recompute"])
@torch.no_grad()
def test_streaming(policy: str) -> None:
    aggregator = make_aggregator(hidden_dim=32, prompt_channel=2).float().to(DEVICE)
    inputs = [x.float().to(DEVICE) for x in features(aggregator, 3)[:2]]
    guidance = [x.float().to(DEVICE) for x in features(aggregator, 3)[2]]
    engine = Engine(aggregator)
    engine.policy, engine.chunk = policy, 2
    expected = engine.logits(*inputs, guidance, 2)
    engine.backend = "triton"
    actual = engine.logits(*inputs, guidance, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_stage_without_a_kernel_falls_back() -> None:
    aggregator = make_aggregator(attention_type="full", prompt_channel=1).float().to(DEVICE)
    inputs = [x.float().to(DEVICE) for x in features(aggregator, 2)[:2]]
    guidance = [x.float().to(DEVICE) for x in features(aggregator, 2)[2]]
    engine = Engine(aggregator)
    expected = engine.logits(*inputs, guidance, None)
    engine.backend = "triton"
    fallbacks = engine.stages(engine.plan()).fallbacks
    assert list(fallbacks) == ["class_attention"]
    torch.testing.assert_close(engine.logits(*inputs, guidance, None), expected, rtol=1e-4, atol=1e-5)


def test_gradients_run_in_torch() -> None:
    aggregator = make_aggregator(prompt_channel=1).float().to(DEVICE)
    inputs = [x.float().to(DEVICE) for x in features(aggregator, 2, 1)[:2]]
    guidance = [x.float().to(DEVICE) for x in features(aggregator, 2, 1)[2]]
    engine = Engine(aggregator)
    engine.backend = "triton"
    engine.logits(*inputs, guidance, None).sum().backward()
    assert all(
        parameter.grad is not None for parameter in aggregator.layers.parameters() if parameter.ndim > 1
    )
