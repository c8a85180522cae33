"""The data type in which text features are computed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast import CATSeg
from catseg_fast import model as model_module
from catseg_fast.engine.precision import text_dtype
from catseg_fast.text import features
from catseg_fast.text.class_lists import SCENE_CLASSES
from support.text_tower import NAMES, count_texts
from support.tiny import tiny_model


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of texts in each call of a text tower."""
    return count_texts(monkeypatch)


def weight_on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize(
    ("asked", "weight", "selects", "expected"),
    [
        (None, weight_on("cuda"), False, torch.float16),
        (
            None,
            weight_on("cuda"),
            True,
            torch.float32,
        ),  # 1e-5 can change the best 256
        (torch.bfloat16, weight_on("cuda"), False, torch.bfloat16),
        (torch.float32, weight_on("cuda"), False, torch.float32),
        (None, weight_on("cuda", torch.bfloat16), False, torch.bfloat16),
        (torch.float32, weight_on("cuda", torch.float16), False, torch.float16),
        (None, weight_on("cpu"), False, torch.float32),
        (torch.float16, weight_on("cpu"), False, torch.float32),
    ],
)
@torch.no_grad()
def test_the_text_towers_type(
    asked: torch.dtype | None, weight: Any, selects: bool, expected: torch.dtype
) -> None:
    assert text_dtype(asked, weight, selects) == expected


def test_the_model_selects_where_it_has_more_classes_than_it_aggregates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def noted(asked: Any, weight: Tensor, selects: bool) -> torch.dtype:
        assert not torch.is_grad_enabled()
        seen.append(selects)
        return weight.dtype

    monkeypatch.setattr(model_module, "text_dtype", noted)
    model = tiny_model("v2", NAMES, max_classes=len(NAMES))
    model.text_features()
    model.max_classes = len(NAMES) - 1
    model.text_features()
    assert set(seen[: seen.index(True)]) == {False}
    assert set(seen[seen.index(True) :]) == {True}
    del seen[:]
    model.backend = "reference"
    model.text_features()
    assert not seen


def test_features_are_computed_again_in_another_type(
    encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("v2", NAMES)
    exact = model.text_features()
    monkeypatch.setattr(model_module, "text_dtype", lambda *_: torch.bfloat16)
    del encoded[:]
    rounded = model.text_features()
    assert sum(encoded) == len(NAMES)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).abs().max() < 0.05
    torch.testing.assert_close(rounded.norm(dim=-1), torch.ones(len(NAMES), 1))
    monkeypatch.undo()
    assert torch.equal(model.text_features(), exact)


def test_overflow_is_computed_in_the_weights_type() -> None:
    model = tiny_model("v2", NAMES)
    exact = model.text_features()
    with torch.no_grad():
        model.clip_model.text_projection *= 1e6  # which the normalisation removes
    assert (
        not features.encode_classes(model.clip_model, model._tokens[False], 1, dtype=torch.float16)
        .isfinite()
        .all()
    )
    found = model.text_encoder.encode(model.clip_model, model._tokens[False], 1, torch.float16)
    torch.testing.assert_close(found, exact)


@torch.no_grad()
def test_sixteen_bits_keep_the_bundled_models_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for types: cosine at least 0.99999, and 99.5 % of the labels."""
    model = CATSeg.from_pretrained("demo", SCENE_CLASSES, device="cpu")
    picture = Path(__file__).parents[1] / "examples" / "scene.jpg"
    exact, labels = model.text_features(), model.segment(picture, sliding_window=False).labels
    monkeypatch.setattr(model_module, "text_dtype", lambda *_: torch.float16)
    rounded = model.text_features()
    assert not torch.equal(rounded, exact)
    assert (rounded * exact).sum(-1).min() >= 0.99999
    agreement = (model.segment(picture, sliding_window=False).labels == labels).float().mean()
    assert agreement >= 0.995
