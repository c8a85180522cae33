"""The drop-in model: classes, weights and checkpoints that change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from catseg_fast import CATSeg
from catseg_fast.config import Version
from support.golden_rule import fill, weight
from support.model_cases import IMAGE, SMALL, backends, versions
from support.tiny import CLASSES, TEMPLATES, V1, V2, close, sem_seg, tiny_model

OTHERS = ("cat", "dog, hound", "wall")


def labels(count: int) -> Tensor:
    return (torch.arange(60 * 90) % count).view(60, 90)


def training_call(model: CATSeg, count: int) -> None:
    """Make a forward pass in training mode with labels below `count`."""
    model.train()
    model([{"image": IMAGE, "sem_seg": labels(count)}])
    model.eval()


# ---- classes ----------------------------------------------------------------------------------------------


@versions
@backends
def test_new_classes_take_effect_at_once(version: Version, backend: str) -> None:
    model = tiny_model(version, sliding_window=False, backend=backend)
    before = sem_seg(model, IMAGE, **SMALL)
    model.set_classes(OTHERS)
    fresh = tiny_model(version, OTHERS, sliding_window=False, backend=backend)
    assert model.classes == OTHERS
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), sem_seg(fresh, IMAGE, **SMALL))
    model.set_classes(list(CLASSES))
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), before)
    training_call(model, len(CLASSES))
    model.set_classes(OTHERS)
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), sem_seg(fresh, IMAGE, **SMALL))


@versions
def test_training_has_its_own_classes(version: Version) -> None:
    model = tiny_model(version, train_classes=OTHERS, sliding_window=False)
    training_call(model, len(OTHERS))  # before the first evaluation
    assert model.classes == CLASSES
    expected = sem_seg(tiny_model(version, sliding_window=False), IMAGE, **SMALL)
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), expected)
    model.train()
    assert model.classes == OTHERS
    with pytest.raises(ValueError, match="3 is not one of 3 classes"):
        model([{"image": IMAGE, "sem_seg": labels(4)}])
    model.set_classes(("a", "b", "c", "d"), training=True)
    model([{"image": IMAGE, "sem_seg": labels(4)}])
    model.eval()
    assert model.classes == CLASSES


def test_classes_of_one_mode_serve_both_where_alone() -> None:
    assert tiny_model().train().classes == CLASSES
    assert tiny_model(classes=None, train_classes=OTHERS).classes == OTHERS


def test_refused_classes_leave_the_present_ones() -> None:
    model = tiny_model(sliding_window=False)
    before = sem_seg(model, IMAGE, **SMALL)
    for refused in ([], ["x", "x"], ["cat", "very " * 80]):
        with pytest.raises(ValueError, match="classes: "):
            model.set_classes(refused)
    assert model.classes == CLASSES
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), before)


def test_no_classes() -> None:
    model = tiny_model(classes=None)
    for call in (lambda: model([{"image": IMAGE}]), lambda: model.segment(IMAGE), model.explain):
        with pytest.raises(ValueError, match=r"classes: none are set; call set_classes"):
            call()


# ---- weights ----------------------------------------------------------------------------------------------

TEXT_TOWER = (
    "token_embedding.weight",
    "positional_embedding",
    "transformer.resblocks.1.ln_1.weight",
    "ln_final.bias",
    "text_projection",
)


@versions
def test_text_features_follow_the_text_tower(version: Version) -> None:
    model, fresh = tiny_model(version), tiny_model(version)
    before = model.text_features()
    for name in TEXT_TOWER:
        with torch.no_grad():
            model.clip_model.get_parameter(name).mul_(-0.5)
        after = model.text_features()
        assert not close(after, before, 1e-3), name
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(after, fresh.text_features()), name
        assert model.text_features() is after  # kept
        before = after


def test_the_image_tower_has_no_say_in_text_features() -> None:
    model = tiny_model()
    before = model.text_features()
    with torch.no_grad():
        model.clip_model.visual.conv1.weight.zero_()
    assert model.text_features() is before


@versions
@backends
def test_loading_weights_takes_effect(version: Version, backend: str) -> None:
    model = tiny_model(version, sliding_window=False, backend=backend)
    before = sem_seg(model, IMAGE, **SMALL)
    other = tiny_model(version, sliding_window=False, backend="reference")
    fill(other, seed=1)
    expected = sem_seg(other, IMAGE, **SMALL)
    assert not close(before, expected, 1e-2)
    model.load_state_dict(other.state_dict())
    assert close(sem_seg(model, IMAGE, **SMALL), expected)


@torch.no_grad()
def test_every_weight_of_the_aggregator_remakes_the_plan() -> None:
    model = tiny_model()
    plan = model.engine.plan()
    assert model.engine.plan() is plan
    for name, parameter in model.aggregator.named_parameters():
        parameter.mul_(0.9)
        assert model.engine.plan() is not plan, name
        plan = model.engine.plan()


def test_rounded_weights_take_effect() -> None:
    model = tiny_model(sliding_window=False)
    before = sem_seg(model, IMAGE, **SMALL)
    model.to(torch.bfloat16).to(torch.float32)
    fresh = tiny_model(sliding_window=False)
    fresh.load_state_dict(model.state_dict())
    after = sem_seg(model, IMAGE, **SMALL)
    assert not close(after, before, 1e-4)
    assert torch.equal(after, sem_seg(fresh, IMAGE, **SMALL))


def test_a_copy_has_weights_of_its_own() -> None:
    model = tiny_model(sliding_window=False)
    before = sem_seg(model, IMAGE, **SMALL)
    duplicate = copy.deepcopy(model)
    fill(duplicate, seed=1)
    expected = tiny_model(sliding_window=False, backend="reference")
    fill(expected, seed=1)
    assert close(sem_seg(duplicate, IMAGE, **SMALL), sem_seg(expected, IMAGE, **SMALL))
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), before)


@versions
def test_a_call_under_autocast_leaves_nothing_rounded(version: Version) -> None:
    model = tiny_model(version, sliding_window=False)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sem_seg(model, IMAGE, **SMALL)
    expected = sem_seg(tiny_model(version, sliding_window=False), IMAGE, **SMALL)
    assert close(rounded, expected, 0.1)
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), expected)


@versions
def test_a_call_in_inference_mode_leaves_nothing_that_cannot_train(version: Version) -> None:
    model = tiny_model(version, sliding_window=False)
    for parameter in model.aggregator.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        sem_seg(model, IMAGE, **SMALL)
    model.train()
    model([{"image": IMAGE, "sem_seg": labels(5)}])["loss_sem_seg"].backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


# ---- checkpoints ------------------------------------------------------------------------------------------


@versions
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("derived", [True, False], ids=["whole", "without derived buffers"])
def test_from_pretrained(version: Version, suffix: str, derived: bool, tmp_path: Path) -> None:
    model = tiny_model(version)
    path = tmp_path / f"model{suffix}"
    ignored = ("attn_mask", "relative_position_index")
    state_dict = {key: x for key, x in model.state_dict().items() if derived or not key.endswith(ignored)}
    torch.save({"model": state_dict}, path) if suffix == ".pth" else save_file(state_dict, path)
    arguments: Any = {"variant": V1, "prompt_ensemble": TEMPLATES} if version == "v1" else {"variant": V2}
    loaded = CATSeg.from_pretrained(path, CLASSES, device="cpu", sliding_window=False, **arguments)
    assert not loaded.training
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]
    model.sliding_window = False
    assert torch.equal(sem_seg(loaded, IMAGE, **SMALL), sem_seg(model, IMAGE, **SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files_and_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(sliding_window=False, backend="reference").half()
    torch.save(model.state_dict(), tmp_path / "half.pth")
    loaded = CATSeg.from_pretrained(
        tmp_path / "half.pth", CLASSES, variant=V2, device="cpu", dtype=dtype, sliding_window=False
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    out = sem_seg(loaded, IMAGE, **SMALL)
    assert out.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert close(out, sem_seg(model.float(), IMAGE, **SMALL), tolerance)


def test_a_checkpoint_of_another_variant(tmp_path: Path) -> None:
    torch.save(tiny_model().state_dict(), tmp_path / "v2.pth")
    with pytest.raises(ValueError, match=r"v2\.pth does not fit the model.*custom-v2.*is tiny-v1"):
        CATSeg.from_pretrained(tmp_path / "v2.pth", CLASSES, variant=V1, prompt_ensemble=TEMPLATES)
    with pytest.raises(ValueError, match="no variant is named 'v3-vitl'"):
        CATSeg.from_pretrained(tmp_path / "v2.pth", variant="v3-vitl")


def test_weights_by_the_rule() -> None:
    """The tiny models are what their names say; otherwise the tests above compare nothing."""
    state = tiny_model("v1").state_dict()
    key = "sem_seg_head.predictor.transformer.conv1.weight"
    assert torch.equal(state[key], weight(key, (32, 2, 7, 7)))
