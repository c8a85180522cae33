"""Equal calls are recorded at the third one and replayed; changed calls are not answered by a recording.

A stand-in for a GPU's recorder has its interface and its pitfalls: each result is overwritten by the next
replay of any recording, and a value that changes outside the inputs stays as it was recorded.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast import CATSeg
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.recording import MOST, GraphCache
from catseg_fast.inference.readout import LabelMap
from support.aggregators import features, make_aggregator
from support.recorders import ReplayAgain, recorded
from support.tiny import CLASSES, picture, tiny_model

SIZE = (24, 36)


@pytest.fixture
def model() -> CATSeg:
    made = tiny_model(classes=CLASSES)
    made.backend = "torch"
    recorded(made.engine)
    return made


@torch.no_grad()
@pytest.mark.parametrize("limit", [None, 2])
def test_logits_from_the_third_call_on(limit: int | None) -> None:
    aggregator = make_aggregator()
    aggregator.max_classes = limit
    engine = Engine(aggregator)
    cache = recorded(engine)
    image, text, guidance = features(aggregator, 4)
    answers = []
    for call in range(5):
        moved = image + call
        answers.append(engine.logits(moved, text, guidance, limit))
        torch.testing.assert_close(answers[-1], aggregator(moved, text, guidance), rtol=1e-11, atol=1e-11)
        assert cache.replays == max(0, call - 1)
    first, second = (aggregator(image + call, text, guidance) for call in (3, 4))
    torch.testing.assert_close(answers[3], first, rtol=1e-11, atol=1e-11)  # no replay overwrote it
    torch.testing.assert_close(answers[4], second, rtol=1e-11, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("sliding", [True, False])
def test_segment_and_label_map_are_recorded(model: CATSeg, sliding: bool) -> None:
    plain = tiny_model(classes=CLASSES)
    for call in range(5):
        image = picture(*SIZE, f"picture {call}")
        answer = model.segment(image, sliding_window=sliding)
        expected = plain.segment(image, sliding_window=sliding)
        assert torch.equal(answer.labels, expected.labels)
        assert torch.equal(answer.scores, expected.scores)
    assert model.engine.recordings.replays == 3
    entry = {"image": picture(*SIZE), "height": 30, "width": 20}
    for _ in range(4):
        (answer,) = model.label_map([entry])
        (expected,) = plain.label_map([entry])
        assert torch.equal(answer.labels, expected.labels)
    assert model.engine.recordings.replays == 5


def another_weight(model: CATSeg) -> None:
    with torch.no_grad():
        model.aggregator.conv1.weight.mul_(-1)


def another_clip(model: CATSeg) -> None:
    with torch.no_grad():
        model.clip_model.visual.conv1.weight.mul_(-1)


def another_state_dict(model: CATSeg) -> None:
    model.load_state_dict(
        {name: -x if x.is_floating_point() else x for name, x in model.state_dict().items()}
    )


def other_classes(model: CATSeg) -> None:
    model.set_classes(CLASSES[::-1])


def fewer_classes(model: CATSeg) -> None:
    model.max_classes = 2


def another_precision(model: CATSeg) -> None:
    model.engine.precision = torch.float64


def another_chunk(model: CATSeg) -> None:
    model.engine.chunk = 3


def another_backend(model: CATSeg) -> None:
    model.backend = "reference"


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        another_weight, another_clip, another_state_dict, other_classes, fewer_classes, another_precision,
        another_chunk, another_backend,
    ],
)  # fmt: skip
def test_what_changed_is_not_answered_by_a_recording(model: CATSeg, change: Callable[[CATSeg], None]) -> None:
    image = picture(*SIZE)
    for _ in range(4):
        model.segment(image)
    replays = model.engine.recordings.replays
    assert replays == 2
    change(model)
    plain = tiny_model(classes=CLASSES)
    change(plain)
    answer, expected = model.segment(image), plain.segment(image)
    assert model.engine.recordings.replays == replays
    assert answer.classes == expected.classes
    assert torch.equal(answer.labels, expected.labels)
    torch.testing.assert_close(answer.scores, expected.scores, rtol=0, atol=1e-6)


@torch.no_grad()
def test_autocast_and_shapes_are_told_apart(model: CATSeg) -> None:
    image = picture(*SIZE)
    first, *_ = [model.segment(image) for _ in range(3)]
    assert model.engine.recordings.replays == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.segment(image)
    model.segment(picture(SIZE[0] + 1, SIZE[1]))
    model.segment(image, sliding_window=not model.sliding_window)
    assert model.engine.recordings.replays == 1
    assert torch.equal(model.segment(image.double()).labels, first.labels)  # which is converted to fp32


@torch.no_grad()
@pytest.mark.parametrize("reduced", [False, True], ids=["own image tower", "image tower in 16 bits"])
def test_every_weight_and_buffer_is_in_the_key(
    model: CATSeg, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reduced:
        monkeypatch.setattr("catseg_fast.engine.precision.image_dtype", lambda *_: torch.bfloat16)
    keys: list[object] = []

    def note(_: GraphCache, key: object, __: object, finish: Callable[[LabelMap], Any]) -> Any:
        keys.append(key)
        return finish(LabelMap(SIZE, model.device))

    monkeypatch.setattr(GraphCache, "replay", note)
    image = picture(*SIZE)

    def key() -> object:
        keys.clear()
        model.segment(image)
        return keys[0]

    before = key()
    assert key() == before
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert len(tensors) > 100
    for name, tensor in tensors.items():
        tensor.copy_(tensor.clone())
        after = key()
        assert after != before, name
        assert key() == after, name
        before = after


def test_recordings_are_bounded_and_the_oldest_goes() -> None:
    cache = GraphCache(ReplayAgain, device_type="cpu")
    x = torch.ones(2)

    def call(key: int) -> Tensor:
        return cache(key, [x], lambda x: x * (key + 1), Tensor.clone)

    for key in range(MOST + 1):
        for _ in range(3):
            assert call(key).tolist() == [key + 1, key + 1]
    assert len(cache.kept) == MOST
    replays = cache.replays
    call(0)
    assert cache.replays == replays
    call(1)
    assert cache.replays == replays + 1


def test_recordings_that_hold_too_much_are_not_kept() -> None:
    class Large(ReplayAgain):
        @property
        def bytes(self) -> int:  # type: ignore[override]
            return self.recorded * 2**31

    cache = GraphCache(Large, device_type="cpu")
    for _ in range(5):
        assert cache("key", [torch.ones(1)], lambda x: x + 1, Tensor.clone).item() == 2
    assert cache.replays == 0
    assert cache.kept == []


def test_a_call_that_cannot_be_recorded_runs_as_before() -> None:
    class Fails(ReplayAgain):
        def __call__(self, run: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    cache = GraphCache(Fails, device_type="cpu")
    run = [lambda: cache("key", [torch.ones(1)], lambda x: x + 1, Tensor.clone).item()] * 5
    assert [run[0](), run[1]()] == [2, 2]
    with pytest.warns(RuntimeWarning, match="graphs: not recorded, calls run as before: operation not"):
        assert run[2]() == 2
    assert [run[3](), run[4]()] == [2, 2]
    assert cache.replays == 0


@torch.no_grad()
def test_off_records_nothing(model: CATSeg) -> None:
    model.engine.graphs = "off"
    for _ in range(4):
        model.segment(picture(*SIZE))
    assert model.engine.recordings.replays == 0
    with pytest.raises(ValueError, match="graphs: 'on' is not one of auto, off"):
        model.engine.graphs = "on"


def test_gradients_are_not_recorded() -> None:
    aggregator = make_aggregator()
    engine = Engine(aggregator)
    cache = recorded(engine)
    for _ in range(4):
        assert engine.logits(*features(aggregator, 3), None).requires_grad
    assert cache.replays == 0


def test_a_dead_plan_is_never_mistaken_for_a_new_one() -> None:
    aggregator = make_aggregator()
    engine = Engine(aggregator)
    cache = recorded(engine)
    with torch.no_grad():
        inputs = features(aggregator, 3)
        for step in range(12):
            aggregator.conv1.weight.mul_(1.1)  # a new plan each time, possibly at the address of an old one
            actual = engine.logits(*inputs, None)
            torch.testing.assert_close(actual, aggregator(*inputs), rtol=1e-11, atol=1e-11, msg=str(step))
    assert cache.replays == 0


def test_threads_get_their_own_answers() -> None:
    cache = GraphCache(ReplayAgain, device_type="cpu")

    def call(value: int) -> float:
        return cache("key", [torch.full((1,), float(value))], lambda x: x * 2, Tensor.clone).item()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(200))) == [2.0 * value for value in range(200)]
    assert cache.replays >= 190


@torch.no_grad()
def test_what_overflows_is_computed_again(model: CATSeg) -> None:
    class Overflows(ReplayAgain):
        def __call__(self, run: Any) -> Any:
            replay = super().__call__(run)

            def overflowed() -> Any:
                answer = replay()
                answer.scores[0, 0] = torch.nan
                return answer

            return overflowed

    recorded(model.engine, Overflows)
    image = picture(*SIZE)
    first, *others = [model.segment(image) for _ in range(4)]
    assert all(torch.equal(first.scores, other.scores) for other in others)
    assert model.engine.recordings.replays == 2


@torch.no_grad()
def test_explain_says_what_recordings_hold(model: CATSeg) -> None:
    assert "graphs     auto; no call yet, 0 in all; 0 of at most 4 recordings hold 0 B\n" in model.explain()
    for _ in range(4):
        model.segment(picture(*SIZE))
    held = "1 of at most 4 recordings hold 0 B of at most 1.0 GiB"
    assert f"graphs     auto; the last call was replayed, 2 in all; {held}\n" in model.explain()
    model.segment(picture(SIZE[0] + 1, SIZE[1]))
    assert "the last call was not replayed, 2 in all" in model.explain()


@torch.no_grad()
def test_explain_says_how_many_steps_there_are_and_who_chose_them(model: CATSeg) -> None:
    model.engine.chunk = 2
    assert "steps      3 for 5 classes, asked for\n" in model.explain()
    model.engine.chunk = None
    assert "steps      5 for 5 classes, chosen\n" in model.explain()


def test_copies_and_pickles_have_settings_and_no_recordings(model: CATSeg) -> None:
    with torch.no_grad():
        for _ in range(3):
            model.segment(picture(*SIZE))
    model.engine.chunk, model.engine.precision = 3, torch.float64
    for copied in (copy.deepcopy(model.aggregator), pickle.loads(pickle.dumps(model.aggregator))):
        engine = copied.engine
        assert engine.aggregator is copied
        assert (engine.chunk, engine.precision, engine.recordings.replays) == (3, torch.float64, 0)
