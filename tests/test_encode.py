"""A picture that stays encoded while the classes change, several pictures in one call, and score maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from catseg_fast import CATSeg, EncodedImage, Segmentation
from support.tiny import CLASSES, agree, close, picture, sem_seg, tiny_model

OTHERS = ("sea", "road", "sky")


@pytest.fixture(scope="module", params=["v1", "v2"])
def model(request: pytest.FixtureRequest) -> CATSeg:
    return tiny_model(request.param)


@pytest.fixture
def towers(model: CATSeg, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of crops in each call of the image tower."""
    calls: list[int] = []
    encode = model.clip_model.encode_dense

    def count(images: Tensor, *args: object) -> object:
        calls.append(len(images))
        return encode(images, *args)

    monkeypatch.setattr(model.clip_model, "encode_dense", count)
    return calls


def same(actual: Segmentation, expected: Segmentation) -> bool:
    return actual.classes == expected.classes and all(
        torch.equal(getattr(actual, name), getattr(expected, name)) for name in ("labels", "scores")
    )


def test_a_change_of_classes_does_not_encode_again(model: CATSeg, towers: list[int]) -> None:
    image = picture(40, 56)
    encoded = model.encode(image)
    assert towers == [5]
    for classes in (OTHERS, CLASSES):
        model.set_classes(classes)
        answer = model.segment(encoded, top_k=2)
        assert towers == [5]
        assert same(answer, model.segment(image, top_k=2))
        assert answer.classes == classes
        assert towers.pop() == 5


def test_an_encoded_image_fits_its_model_and_call(model: CATSeg) -> None:
    encoded = model.encode(picture(40, 56), sliding_window=False)
    assert encoded.nbytes == sum(x.nbytes for x in (encoded.features, *encoded.guidance))
    assert same(model.segment(encoded), model.segment(picture(40, 56), sliding_window=False))
    with pytest.raises(ValueError, match="sliding_window: True, and the image was encoded with False"):
        model.segment(encoded, sliding_window=True)
    other = replace(encoded, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"encoded on cpu in torch\.float64, and the model is .* torch\.float32"
    ):
        model.segment(other)


@pytest.mark.parametrize("sliding", [True, False])
def test_a_batch_is_its_pictures_one_by_one(model: CATSeg, towers: list[int], sliding: bool) -> None:
    images = [picture(40, 56, "one"), picture(64, 32, "two"), picture(40, 56, "three")]
    kept = model.encode(images[1], sliding_window=sliding)
    towers.clear()
    answers = model.segment_batch([images[0], kept, images[2]], sliding_window=sliding, top_k=2)
    assert towers == [10 if sliding else 2]
    expected = [model.segment(image, sliding_window=sliding, top_k=5) for image in images]
    assert all(map(agree, answers, expected))
    assert [answer.labels.shape for answer in answers] == [(40, 56), (64, 32), (40, 56)]
    assert not agree(answers[0], expected[2])
    assert model.segment_batch([]) == []


def test_pictures_of_several_sizes_as_wholes(model: CATSeg) -> None:
    images = [picture(40, 56, "one"), picture(64, 32, "two")]
    answers = model.segment_batch(images, sliding_window=False)
    expected = [model.segment(image, sliding_window=False, top_k=5) for image in images]
    assert all(map(agree, answers, expected))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_score_maps_are_the_probabilities(model: CATSeg, backend: str) -> None:
    model.backend = backend
    image = picture(40, 56)
    answer = model.segment(image, keep_logits=True)
    truth = sem_seg(model, image, height=40, width=56)
    for index, name in enumerate(model.classes):
        assert close(answer.score_map(name), truth[index])
        assert torch.equal(answer.score_map(index), answer.score_map(name))
    stacked = torch.stack([answer.score_map(index) for index in range(len(model.classes))])
    assert torch.equal(stacked.amax(dim=0), answer.scores)
    model.backend = "auto"


def test_score_maps_of_no_class(model: CATSeg) -> None:
    answer = model.segment(picture(40, 56), sliding_window=False, keep_logits=True)
    with pytest.raises(ValueError, match=r"label: 5 is not in 0\.\.4"):
        answer.score_map(5)
    with pytest.raises(ValueError, match="label: 'cat' is not one of the 5 classes"):
        answer.score_map("cat")
    with pytest.raises(ValueError, match="keep_logits=True"):
        model.segment(picture(40, 56), sliding_window=False).score_map(0)


def test_chunks_of_classes_fill_the_kept_logits(model: CATSeg) -> None:
    image = model.encode(picture(40, 56), sliding_window=False)
    assert isinstance(image, EncodedImage)
    whole = model.segment(image, keep_logits=True)
    model.engine.chunk = 2
    parts = model.segment(image, keep_logits=True)
    model.engine.chunk = None
    assert whole.logits is not None
    assert parts.logits is not None
    assert close(parts.logits, whole.logits, 1e-4)
