"""The engine against outputs of the real upstream code: the golden cases on the torch back end."""

from __future__ import annotations

import pytest
import torch

from catseg_fast import Aggregator, CATSeg
from support.golden_models import build_model, cases, constructor_arguments, golden_image, parameters
from support.golden_rule import assert_output, fill, load_case, make_inputs

FLOOR = 5e-6
MANY = 40  # classes from which on no label map, a second call, is computed


@pytest.mark.parametrize("name", parameters(name for name in cases("module") if name.startswith("agg_")))
@torch.no_grad()
def test_aggregator(name: str) -> None:
    case = load_case(name)
    _, meta = case
    aggregator = Aggregator(**constructor_arguments(meta), backend="torch").eval()
    fill(aggregator, meta["prefix"], meta["seed"])
    inputs = make_inputs(meta)
    guidance = [inputs.get(f"guidance{i}") for i in range(3)]
    logits = aggregator(inputs["img_feats"], inputs["text_feats"], guidance)
    assert_output(case, "out", logits, floor=FLOOR)
    if "kept_first_batch" in meta:
        assert (logits[0] != -100).flatten(1).any(1).nonzero().flatten().tolist() == meta["kept_first_batch"]


@pytest.mark.parametrize("name", cases("model"))
@torch.no_grad()
def test_model(name: str) -> None:
    case = load_case(name)
    _, meta = case
    model = build_model(meta, CATSeg)
    model.backend = "torch"
    image = golden_image(meta, make_inputs(meta))
    probabilities = model([image])[0]["sem_seg"]
    assert_output(case, "out", probabilities, factor=4, floor=FLOOR)
    if len(probabilities) >= MANY:
        return
    segmentation = model.label_map([image])[0]
    scores, labels = probabilities.max(dim=0)
    assert torch.equal(segmentation.labels, labels.int())
    assert torch.equal(segmentation.scores, scores)
