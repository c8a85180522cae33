"""Back ends of the model, and its limits of classes and memory."""

from __future__ import annotations

import re

import pytest
import torch

from catseg_fast import CATSeg
from catseg_fast.config import Version
from support.model_cases import IMAGE, SMALL, WINDOW, backends, paths, versions
from support.tiny import V2, close, sem_seg, tiny_model


@versions
@paths
@pytest.mark.parametrize("count", [1, 12])
def test_back_ends_agree(version: Version, sliding: bool, count: int) -> None:
    classes = [f"thing {index}" for index in range(count)]
    model = tiny_model(version, classes, sliding_window=sliding, window=WINDOW, backend="reference")
    expected = sem_seg(model, IMAGE, **SMALL)
    assert expected.shape == (count, 24, 32)
    assert expected.isfinite().all()
    for backend in ("torch", "auto"):
        model.backend = backend
        assert model.backend == model.aggregator.backend == backend
        assert close(sem_seg(model, IMAGE, **SMALL), expected)


def test_unknown_back_ends() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="backend: 'cuda' is not one of auto, triton, torch, reference"):
        model.backend = "cuda"
    assert model.backend == "auto"
    with pytest.raises(ValueError, match="backend: 'cuda' is not one of"):
        tiny_model(backend="cuda")


def test_a_back_end_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_model(backend="triton")
    for call in (lambda: model([{"image": IMAGE}]), lambda: model.segment(IMAGE), model.explain):
        with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run: \w+"):
            call()
    model.backend = "torch"
    model.segment(IMAGE, sliding_window=False)


@backends
def test_limited_vocabulary(backend: str) -> None:
    classes = [f"thing {index}" for index in range(12)]
    model = tiny_model("v2", classes, sliding_window=False, backend=backend)
    assert model.max_classes == V2.pad_len
    limited = sem_seg(model, IMAGE, **SMALL)
    dropped = limited.flatten(1).amax(dim=1) < 1e-30
    assert dropped.sum() == 12 - V2.pad_len
    zero = torch.full((), -100.0).sigmoid()
    assert limited[dropped].max() <= zero
    model.max_classes = None
    every = sem_seg(model, IMAGE, **SMALL)
    assert every.min() > 1e-6
    model.max_classes = 12
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), every)
    model.max_classes = V2.pad_len
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), limited)


@versions
@backends
def test_each_crop_chooses_its_own_classes(version: Version, backend: str) -> None:
    classes = [f"thing {index}" for index in range(9)]
    model = tiny_model(version, classes, window=WINDOW, max_classes=2, backend=backend)
    limited = sem_seg(model, IMAGE)
    model.backend = "reference"
    expected = sem_seg(model, IMAGE)
    assert close(limited, expected)
    assert 2 <= (expected.flatten(1).amax(dim=1) > 1e-30).sum() < 9


def test_no_limit_by_default_in_v1() -> None:
    assert tiny_model("v1").max_classes is None
    assert tiny_model("v1", max_classes=3).max_classes == 3
    assert tiny_model("v2", max_classes=None).max_classes is None


@pytest.mark.parametrize("count", [0, -3])
def test_a_limit_that_is_not_positive(count: int) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=f"max_classes: {count} is not positive"):
        model.max_classes = count
    assert model.max_classes == V2.pad_len
    with pytest.raises(ValueError, match=f"max_classes: {count} is not positive"):
        tiny_model(max_classes=count)


def test_explain() -> None:
    lines = explained(tiny_model())
    assert lines["back end"] == "torch (asked for: auto)"
    assert lines["classes"] == "5, all aggregated"
    assert lines["precision"] == "float32"
    assert lines["policy"].startswith("resident: ")
    assert lines["step"].endswith("classes of 5 crops")
    model = tiny_model(classes=[f"thing {index}" for index in range(12)], sliding_window=False)
    assert explained(model)["classes"] == "12, the best 8 per crop"
    assert explained(model)["step"].endswith("classes of 1 crops")
    model.engine.policy, model.engine.chunk = "recompute", 3
    assert explained(model)["policy"] == "recompute: asked for"
    assert explained(model)["step"] == "3 classes of 1 crops"
    model.backend = "reference"
    assert explained(model).keys() == {"back end", "classes"}


def explained(model: CATSeg) -> dict[str, str]:
    return {line[:10].strip(): line[11:] for line in model.explain().splitlines()}


@versions
@paths
def test_a_budget_that_is_too_small_names_the_least(version: Version, sliding: bool) -> None:
    model = tiny_model(version, sliding_window=sliding, window=WINDOW)
    expected = sem_seg(model, IMAGE, **SMALL)
    model.engine.memory_budget = "1KiB"
    with pytest.raises(ValueError, match=r"memory_budget: 1.0 KiB does not hold") as caught:
        sem_seg(model, IMAGE, **SMALL)
    least = int(re.search(r"the least that works is .* \((\d+) bytes\)", str(caught.value))[1])  # type: ignore[index]
    model.engine.memory_budget = least
    assert close(sem_seg(model, IMAGE, **SMALL), expected)
    model.engine.memory_budget = least - 1
    with pytest.raises(ValueError, match=f"{least} bytes"):
        sem_seg(model, IMAGE, **SMALL)
    with pytest.raises(ValueError, match="memory_budget"):
        tiny_model(memory_budget="plenty")


@versions
def test_a_budget_that_explains_itself_holds_a_call(version: Version) -> None:
    model = tiny_model(version, window=WINDOW, memory_budget=1000)
    with pytest.raises(ValueError, match="the least that works is") as caught:
        model.explain()
    least = int(re.search(r"\((\d+) bytes\)", str(caught.value))[1])  # type: ignore[index]
    model.engine.memory_budget = least + 8 * 24 * 32  # and the answer
    assert model.label_map([{"image": IMAGE, **SMALL}])[0].labels.shape == (24, 32)
