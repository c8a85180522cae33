"""Classes with several names, and pixels that no class fits, against the probabilities of all names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast import CATSeg, Segmentation
from catseg_fast.backend import why_no_triton
from catseg_fast.errors import InputError, InputTypeError
from catseg_fast.inference.readout import LabelMap, Readout, TopClasses, reader
from catseg_fast.reference.inference import SlidingWindow
from catseg_fast.text.fold import Fold
from support.tiny import picture, sem_seg, tiny_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = {
    "sky": "sky",
    "background": ["wall", "floor, ground", "door"],
    "tree": ["tree"],
    "house": ["hut", "house"],
}
FOLD = Fold.of(CLASSES)
WINDOWS = [None, SlidingWindow(8, 0.25, (20, 26))]
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(why_no_triton(DEVICE) is not None, reason="no Triton")),
]
SIZE = (13, 17)


def folded(maps: Tensor) -> Tensor:
    """Return probabilities `[T, H, W]` of the classes, from those of all names."""
    return torch.stack([maps[FOLD.names_of(index)].amax(dim=0) for index in range(len(FOLD.classes))])


def make_logits(window: SlidingWindow | None) -> Tensor:
    """Return logits with many equal values."""
    crops = 1 if window is None else len(window.corners()) + 1
    generator = torch.Generator().manual_seed(3)
    return torch.randn(crops, len(FOLD.names), 6, 6, generator=generator).round().to(DEVICE)


def read(target: Any, logits: Tensor, readout: Readout, backend: str, step: int) -> Any:
    consume = reader(readout, target, backend)
    for start in range(0, logits.shape[1], step):
        consume(slice(start, min(start + step, logits.shape[1])), logits[:, start : start + step])
    return target


def every_name(logits: Tensor, readout: Readout, backend: str) -> Tensor:
    """Return all names' probabilities, each read out separately by the same code."""
    maps = [
        read(LabelMap(SIZE, DEVICE), logits[:, name : name + 1], readout, backend, 1).scores
        for name in range(logits.shape[1])
    ]
    return torch.stack(maps).cpu()


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("window", WINDOWS, ids=["whole", "sliding"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_label_maps_equal_the_full_probabilities(
    backend: str, window: SlidingWindow | None, step: int
) -> None:
    readout, logits = Readout(SIZE, window), make_logits(window)
    maps = folded(every_name(logits, readout, backend))
    target = read(LabelMap(SIZE, DEVICE), logits, readout, backend, step)
    answer = Segmentation.of(target, FOLD.names, readout, logits, fold=FOLD)
    assert answer.classes == FOLD.classes
    assert torch.equal(answer.labels, maps.argmax(dim=0).int())
    assert torch.equal(answer.scores, maps.amax(dim=0))
    threshold = float(maps.amax(dim=0).median())  # a value that occurs, to distinguish < from <=
    dropped = answer.with_min_score(threshold)
    expected = torch.where(maps.amax(dim=0) < threshold, -1, maps.argmax(dim=0)).int()
    assert torch.equal(dropped.labels, expected)
    assert torch.equal(dropped.scores, answer.scores)
    assert 0 < (expected < 0).sum() < expected.numel()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("window", WINDOWS, ids=["whole", "sliding"])
def test_top_classes_equal_the_full_probabilities(
    window: SlidingWindow | None, step: int, count: int
) -> None:
    readout, logits = Readout(SIZE, window), make_logits(window)
    logits[:, 2, :2, :2] = logits[:, 6, 2:, :1] = math.nan
    maps = folded(every_name(logits, readout, "torch"))
    scores, labels = maps.sort(dim=0, descending=True, stable=True)
    target = TopClasses(count, SIZE, DEVICE, FOLD.owners)
    for _ in range(2):  # anew
        read(target, logits, readout, "torch", step)
    answer = Segmentation.of(target, FOLD.names, readout, fold=FOLD)
    assert answer.top_labels is not None
    assert torch.equal(answer.top_labels, labels[:count].int())
    torch.testing.assert_close(answer.top_scores, scores[:count], rtol=0, atol=0, equal_nan=True)
    expected = labels[:count].masked_fill(scores[:count] < 0.5, -1).int()
    dropped = answer.with_min_score(0.5)
    assert dropped.top_labels is not None
    assert torch.equal(dropped.top_labels, expected)
    assert torch.equal(dropped.labels, expected[0])


def streamed(model: CATSeg) -> CATSeg:
    """Stream two classes at a time, which are computed again between passes."""
    model.engine.policy, model.engine.chunk = "recompute", 2
    return model


@pytest.mark.parametrize("prepare", [lambda model: model, streamed], ids=["at once", "streamed"])
@pytest.mark.parametrize("sliding", [True, False], ids=["sliding", "whole"])
@torch.no_grad()
def test_a_model_equals_its_own_probabilities(prepare: Callable[[CATSeg], CATSeg], sliding: bool) -> None:
    model = prepare(tiny_model("v2", None, sliding_window=sliding, backend="torch", max_classes=None))
    model.set_classes(CLASSES)
    assert (model.classes, model.label_classes) == (FOLD.names, FOLD.classes)
    image, size = picture(40, 56), {"height": 40, "width": 56}
    maps = folded(sem_seg(model, image, **size))
    best, threshold = maps.amax(dim=0), float(maps.amax(dim=0).median())
    expected = torch.where(best < threshold, -1, maps.argmax(dim=0)).int()
    (answer,) = model.label_map([{"image": image, **size}], min_score=threshold)
    assert torch.equal(answer.labels, expected)
    assert torch.equal(answer.scores, best)
    assert answer.classes == FOLD.classes
    (top,) = model.label_map([{"image": image, **size}], top_k=9, min_score=threshold)
    assert top.top_scores is not None
    assert torch.equal(top.top_scores, maps.sort(dim=0, descending=True, stable=True).values)
    assert torch.equal(top.labels, expected)


@torch.no_grad()
def test_every_way_to_segment_knows_threshold_and_fold() -> None:
    model = tiny_model("v2", None, sliding_window=False)
    model.set_classes(CLASSES)
    image = picture(40, 56)
    whole = model.segment(image)
    threshold = float(whole.scores.median())
    answers = [
        model.segment(image, min_score=threshold),
        model.segment(model.encode(image), min_score=threshold),
        model.segment(image, min_score=threshold, keep_logits=True),
        model.segment_batch([image], min_score=threshold)[0],
        model.segment(image, min_score=threshold, top_k=1),
    ]
    expected = whole.labels.masked_fill(whole.scores < threshold, -1)
    for answer in answers:
        assert answer.min_score == threshold
        assert answer.classes == FOLD.classes
        assert torch.equal(answer.labels, expected)
        assert torch.equal(answer.scores, whole.scores)
    maps = torch.stack([answers[2].score_map(name) for name in FOLD.classes])
    assert torch.equal(maps.amax(dim=0), whole.scores)
    assert torch.equal(maps.argmax(dim=0).int(), whole.labels)
    with pytest.raises(ValueError, match=r"label: -1 is not in 0\.\.3"):
        answers[2].score_map(-1)


def test_a_list_ends_the_fold_and_a_refused_one_leaves_it() -> None:
    model = tiny_model("v2", None)
    model.set_classes(CLASSES)
    with pytest.raises(InputError, match="no names"):
        model.set_classes({"sky": []})
    assert model.fold == FOLD
    with pytest.raises(InputError, match="in training each class has one name"):
        model.set_classes(CLASSES, training=True)
    model.set_classes(["sky", "tree"])
    assert model.fold is None
    assert model.label_classes == ("sky", "tree")


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ({}, ValueError, "classes: the list is empty"),
        ({"sky": "sky", "other": []}, InputError, "classes: 'other' has no names; list at least one"),
        ({"sky": ["a"], "house": ["b", "a"]}, InputError, "'a' is a name of 'sky' and of 'house'"),
        ({"sky": ["a", "a"]}, ValueError, "classes: 'sky': 'a' is listed twice"),
        ({"sky": [" "]}, ValueError, "classes: 'sky': entry 0 is blank"),
        ({"sky": 3}, InputTypeError, "classes: 'sky' has 3; expected its name or a list of its names"),
        ({"sky": [3]}, InputTypeError, r"classes: 'sky' has \[3\]"),
        ({3: "sky"}, InputTypeError, "classes: entry 0 is 3, not a string"),
    ],
)
def test_folds_that_cannot_be(classes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fold.of(classes)


@pytest.mark.parametrize("min_score", [-0.1, 1.5, math.nan, math.inf])
def test_thresholds_out_of_range(min_score: float) -> None:
    model = tiny_model("v2", sliding_window=False)
    message = re.escape(f"min_score: expected a probability in 0..1, got {min_score}; 0 labels every pixel")
    for call in (model.segment, model.segment_batch, model.label_map):
        with pytest.raises(InputError, match=message):
            call([], min_score=min_score)  # before the picture is looked at
    with pytest.raises(InputTypeError, match=r"min_score: expected a number, got '0.3'"):
        model.segment("no picture", min_score="0.3")  # type: ignore[arg-type]


def test_dropped_labels_do_not_come_back() -> None:
    answer = Segmentation(torch.zeros(2, 2, dtype=torch.int32), torch.full((2, 2), 0.4), ("sky",))
    assert answer.with_min_score(None) is answer
    dropped = answer.with_min_score(0.5)
    assert (dropped.labels == -1).all()
    assert (dropped.with_min_score(0.6).labels == -1).all()
    with pytest.raises(InputError, match=r"min_score: 0\.3 is below 0\.5"):
        dropped.with_min_score(0.3)
    assert (answer.with_min_score(0.4).labels == 0).all()  # which is 0.4 in fp32, and not below it
