"""The vocabulary of more than ten thousand nouns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from catseg_fast import CATSeg, ready_list
from catseg_fast.text.class_lists import NOUNS
from support.tiny import V2, picture, tiny_model

# 36 positions, not 576, and one layer.
SMALL = replace(
    V2, clip=replace(V2.clip, input_size=96), feature_resolution=(6, 6), window_size=6, num_layers=1
)


@torch.no_grad()
def test_all_nouns_stream_in_memory_that_does_not_grow() -> None:
    names = ready_list(NOUNS).classes
    model = tiny_model("v2", list(names), variant=SMALL, sliding_window=False, max_classes=None)
    image = picture(48, 64)
    model.engine.memory_budget, model.engine.chunk = "100MiB", 200
    lines = model.explain()
    assert "recompute: the state of 11400 classes does not fit" in lines
    assert "11400, all aggregated" in lines
    streamed = model.segment(image, top_k=3)
    model.engine.memory_budget, model.engine.policy = None, "resident"
    at_once = model.segment(image, top_k=3)
    assert streamed.top_scores is not None
    assert at_once.top_scores is not None
    torch.testing.assert_close(streamed.top_scores, at_once.top_scores, rtol=0, atol=1e-5)
    apart = streamed.top_scores[0] - streamed.top_scores[1]
    assert ((streamed.labels == at_once.labels) | (apart < 1e-5)).all()


@pytest.mark.slow
def test_the_bundled_model_takes_all_nouns() -> None:
    """It takes about 20 minutes on one core."""
    names = ready_list(NOUNS).classes
    model = CATSeg.from_pretrained("demo", names, max_classes=None, memory_budget="1GiB", device="cpu")
    scene = Path(__file__).parents[1] / "examples" / "scene.jpg"
    answer = model.segment(scene, sliding_window=False)
    assert answer.scores.isfinite().all()
    assert answer.labels.unique().numel() > 5
