"""CLIP's image tower in 16 bits: the choice of its type, its labels, overflow, and its weights.

A CPU computes in the weights' type; here the other types are set by hand.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from catseg_fast import CATSeg
from catseg_fast.data.scenes.dataset import SPLITS
from catseg_fast.engine import precision
from catseg_fast.inference.encoding import image_type
from catseg_fast.inference.tower import reduced_clip
from catseg_fast.weights import module_tensors
from support.tiny import CLASSES, close, picture, tiny_model

SCENE = Path(__file__).parents[1] / "examples" / "scene.jpg"


@pytest.fixture
def model() -> CATSeg:
    return tiny_model(classes=CLASSES)


def ask_for(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(precision, "image_dtype", lambda *_: dtype)


@torch.no_grad()
def test_labels_of_the_bundled_model_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for types: 99.5 % of the labels, also if only the best classes are aggregated."""
    model = CATSeg.from_pretrained("demo", SPLITS["held-out"].class_names[:24], device="cpu")
    for limit in (None, 12):
        model.max_classes = limit
        exact = model.segment(SCENE, sliding_window=False)
        with monkeypatch.context() as patch:
            ask_for(patch, torch.float16)
            rounded = model.segment(SCENE, sliding_window=False)
        assert not torch.equal(rounded.scores, exact.scores)
        assert (rounded.labels == exact.labels).float().mean() >= 0.995


@pytest.mark.parametrize(
    ("asked", "weight", "expected"),
    [
        (None, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (None, torch.float64, torch.float64),
    ],
)
@torch.no_grad()
def test_types_on_a_gpu(asked: Any, weight: torch.dtype, expected: torch.dtype) -> None:
    def of(device: str) -> torch.dtype:
        return precision.image_dtype(asked, SimpleNamespace(device=torch.device(device), dtype=weight))  # type: ignore[arg-type]

    assert of("cuda") == expected
    assert of("cpu") == weight
    with torch.enable_grad():
        assert of("cuda") == weight


@torch.no_grad()
def test_the_reference_computes_in_the_weights_type(model: CATSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for(monkeypatch, torch.float16)
    assert image_type(model) == torch.float16
    model.backend = "reference"
    assert image_type(model) == torch.float32


@torch.no_grad()
def test_the_tower_follows_its_weights_and_leaves_them_alone(model: CATSeg) -> None:
    before = {name: x.clone() for name, x in model.state_dict().items()}
    clip = model.clip_model
    reduced = reduced_clip(clip, torch.float16)
    assert reduced is reduced_clip(clip, torch.float16)
    assert {x.dtype for x in module_tensors(reduced.visual)} == {torch.float16}
    assert reduced.token_embedding.weight.data_ptr() == clip.token_embedding.weight.data_ptr()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert len(model.state_dict()) == len(before)

    clip.visual.conv1.weight.mul_(2)
    changed = reduced_clip(clip, torch.float16)
    assert changed is not reduced
    assert torch.equal(changed.visual.conv1.weight, clip.visual.conv1.weight.half())
    other = copy.deepcopy(clip)
    assert reduced_clip(other, torch.float16) is not changed


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_encoded_picture_serves_as_one_that_is_not(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(version)
    ask_for(monkeypatch, torch.float16)
    image = picture(40, 50)
    encoded, exact = model.encode(image), model.segment(image)
    assert encoded.features.dtype == torch.float16
    assert torch.equal(model.segment(encoded).scores, exact.scores)


@torch.no_grad()
def test_what_overflows_is_computed_in_bf16_from_then_on(
    model: CATSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.clip_model.visual.ln_pre.weight.mul_(1e6)  # within the range of fp32 and bf16
    exact = model.segment(picture(40, 50))
    assert exact.scores.isfinite().all()
    ask_for(monkeypatch, torch.float16)
    with pytest.warns(RuntimeWarning, match="CLIP: fp16 overflowed: computing again in bf16"):
        first = model.segment(picture(40, 50))
    assert close(first.scores, exact.scores, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = model.segment(picture(40, 50))
    assert torch.equal(first.scores, second.scores)
    assert reduced_clip(model.clip_model, torch.float16).visual.proj.dtype == torch.bfloat16


@torch.no_grad()
def test_a_picture_that_is_not_finite_is_not_computed_twice(
    model: CATSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for(monkeypatch, torch.float16)
    (answer,) = model.label_map([{"image": torch.full((3, 40, 50), torch.inf)}])
    assert answer.scores.isnan().any()
    assert reduced_clip(model.clip_model, torch.float16).visual.proj.dtype == torch.float16
