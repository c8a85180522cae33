"""Everything that a recording depends on: memory that it reads, PyTorch's modes, threads, free memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from catseg_fast import CATSeg
from catseg_fast.engine import recording, schedule
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.recording import GraphCache
from catseg_fast.inference import segmentation, tower
from catseg_fast.inference.graphs import ModelGraphs
from support.aggregators import features, make_aggregator
from support.recorders import ReplayAgain, ReplayWatched, recorded
from support.tiny import picture, tiny_model

SIZE, CLASSES = (24, 36), ("wall", "sky", "tree")


def small_model() -> CATSeg:
    made = tiny_model(classes=CLASSES, sliding_window=False)
    made.backend = "torch"
    return made


@pytest.fixture
def model() -> CATSeg:
    made = small_model()
    recorded(made.engine, ReplayWatched)
    return made


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers be copied, as they are on their way from a GPU."""
    monkeypatch.setattr(segmentation, "to_host", lambda *tensors: [x.clone() for x in tensors])


def other_classes(model: CATSeg) -> Iterator[None]:
    model.set_classes(CLASSES[::-1])
    yield
    model.set_classes(CLASSES)


def another_precision(model: CATSeg) -> Iterator[None]:
    model.engine.precision = torch.float64
    yield
    model.engine.precision = None


def another_backend(model: CATSeg) -> Iterator[None]:
    model.backend = "reference"
    yield
    model.backend = "torch"


def another_limit(model: CATSeg) -> Iterator[None]:
    model.max_classes = 2
    yield
    model.max_classes = None


def another_weight(model: CATSeg) -> Iterator[None]:
    weight = model.aggregator.head.weight
    with torch.no_grad():
        before = weight.clone()
        weight.zero_()
        yield
        weight.copy_(before)


def training(model: CATSeg) -> Iterator[None]:
    model.train()
    yield
    model.eval()


def autocast(model: CATSeg) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        other_classes, another_precision, another_backend, another_limit, another_weight, training, autocast,
    ],
)  # fmt: skip
def test_memory_that_a_recording_reads_is_not_freed(
    model: CATSeg, change: Callable[[CATSeg], Iterator[None]]
) -> None:
    """Settings that are changed and set back are those of an old recording, which may be of freed tensors."""
    image = picture(*SIZE)
    expected = small_model().segment(image)

    def check() -> None:
        for _ in range(3):
            answer = model.segment(image)
            torch.testing.assert_close(answer.scores, expected.scores, rtol=0, atol=1e-6)
            assert torch.equal(answer.labels, expected.labels)

    check()
    assert model.engine.recordings.replays == 1
    with contextmanager(change)(model):
        for _ in range(3):
            model.segment(image)
    check()


@torch.no_grad()
def test_autocast_that_has_ended_and_begins_again(model: CATSeg) -> None:
    """While it lasts, it caches the weights that it has cast; a recording must not read these."""
    image, replays = picture(*SIZE), 0
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            answers = [model.segment(image) for _ in range(4)]
            assert torch.is_autocast_cache_enabled()
        assert all(torch.equal(answers[0].labels, other.labels) for other in answers)
        assert model.engine.recordings.replays > replays
        replays = model.engine.recordings.replays


@torch.no_grad()
def test_a_tower_in_16_bits_is_part_of_a_recording(model: CATSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catseg_fast.engine.precision.image_dtype", lambda *_: torch.bfloat16)
    image = picture(*SIZE)
    first, *_ = [model.segment(image) for _ in range(4)]
    replays = model.engine.recordings.replays
    assert replays == 2
    tower.forget(model.clip_model)
    assert torch.equal(model.segment(image).labels, first.labels)
    assert model.engine.recordings.replays == replays


def test_a_model_that_is_moved_gets_another_recorder() -> None:
    made: list[torch.device] = []

    class Noted(ReplayAgain):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(device)

    cache = GraphCache(Noted, device_type="cpu")
    for device in ("cpu", "meta", "cpu"):
        for _ in range(4):
            cache("key", [torch.ones(2, device=device)], lambda x: x + 1, Tensor.clone)
    assert [device.type for device in made] == ["cpu", "meta", "cpu"]


@torch.no_grad()
def test_inputs_that_change_in_place() -> None:
    aggregator = make_aggregator()
    engine = Engine(aggregator)
    cache = recorded(engine, ReplayWatched)
    image, text, guidance = features(aggregator, 4)
    text = text.clone()  # it was expanded
    for call in range(12):
        changed = (image, guidance[0], text)[call // 4]
        changed.add_(0.1)
        actual = engine.logits(image, text, guidance, None)
        torch.testing.assert_close(actual, aggregator(image, text, guidance), rtol=1e-11, atol=1e-11)
    assert cache.replays == 6  # not after a change of the text


@torch.no_grad()
def test_answers_belong_to_the_caller() -> None:
    aggregator = make_aggregator()
    engine = Engine(aggregator)
    recorded(engine)
    image, text, guidance = features(aggregator, 4)
    answers = [engine.logits(image * call, text, guidance, None) for call in range(1, 7)]
    for call, answer in enumerate(answers, 1):
        expected = aggregator(image * call, text, guidance)
        torch.testing.assert_close(answer, expected, rtol=1e-11, atol=1e-11)
        answer.zero_()  # and changing them changes no other
    assert len({answer.data_ptr() for answer in answers}) == len(answers)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=str)
def test_recordings_serve_every_mode(model: CATSeg, mode: Any) -> None:
    expected = small_model().segment(picture(*SIZE))
    for first in (mode, torch.no_grad):
        with first():
            for _ in range(4):
                answer = model.segment(picture(*SIZE))
                assert torch.equal(answer.labels, expected.labels)
    assert model.engine.recordings.replays == 6


@torch.no_grad()
def test_no_random_numbers_are_drawn(model: CATSeg) -> None:
    state = torch.get_rng_state()
    for _ in range(4):
        model.segment(picture(*SIZE))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_threads_that_share_a_model(model: CATSeg, copied: None) -> None:
    plain = small_model()
    images = [picture(*SIZE, f"picture {number}") for number in range(4)]
    expected = [plain.segment(image) for image in images]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda number: model.segment(images[number % 4]), range(16)))
    for number, answer in enumerate(answers):
        torch.testing.assert_close(answer.scores, expected[number % 4].scores, rtol=0, atol=1e-6)
    assert model.engine.recordings.replays


@torch.no_grad()
def test_copies_and_pickles_of_a_model_that_replays(model: CATSeg) -> None:
    image = picture(*SIZE)
    expected, *_ = [model.segment(image) for _ in range(4)]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.engine.recordings.replays == 0
        recorded(copied.engine, ReplayWatched)
        for _ in range(4):
            assert torch.equal(copied.segment(image).labels, expected.labels)
        assert copied.engine.recordings.replays == 2


@torch.no_grad()
def test_a_recording_is_replayed_when_memory_is_short(model: CATSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds its memory already; a smaller schedule would be another recording, which takes more."""
    image = picture(*SIZE)
    first, *_ = [model.segment(image) for _ in range(3)]
    monkeypatch.setattr(schedule, "free_bytes", lambda _: 0)
    answer = model.segment(image)
    assert torch.equal(answer.labels, first.labels)
    assert model.engine.recordings.replays == 2
    with pytest.raises(ValueError, match="memory_budget: 0 B does not hold"):
        model.segment(picture(SIZE[0] + 1, SIZE[1]))


def test_memory_that_runs_out_in_a_recording() -> None:
    class Full(ReplayAgain):
        def __call__(self, run: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    cache = GraphCache(Full, device_type="cpu")
    with pytest.warns(RuntimeWarning, match="graphs: not recorded, calls run as before: CUDA out of memory"):
        answers = [cache("key", [torch.ones(1)], lambda x: x + 1, Tensor.clone).item() for _ in range(5)]
    assert answers == [2] * 5


def test_one_that_is_too_large_does_not_cost_the_others() -> None:
    class Growing(ReplayAgain):
        @property
        def bytes(self) -> int:  # type: ignore[override]
            return (0, 1, 1 + 2**31)[self.recorded]

    cache = GraphCache(Growing, device_type="cpu")
    for key in ("small", "large", "small"):
        for _ in range(4):
            cache(key, [torch.ones(1)], lambda x: x + 1, Tensor.clone)
    assert cache.kept == [1]
    assert cache.replays == 2 + 4


def test_modes_are_set_back_after_a_recording_that_fails() -> None:
    def fail(x: Tensor) -> Tensor:
        assert not torch.is_autocast_cache_enabled()
        assert not torch.is_inference_mode_enabled()
        raise ValueError("it fails")

    def run(x: Tensor) -> Tensor:
        return fail(x) if not torch.is_autocast_cache_enabled() else x + 1

    cache = GraphCache(ReplayAgain, device_type="cpu")

    def call() -> None:
        assert cache("key", [torch.ones(1)], run, Tensor.clone).item() == 2
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_cache_enabled()

    with torch.inference_mode():
        call()
        call()
        with pytest.warns(RuntimeWarning, match=r"not recorded.*it fails"):
            call()
        call()


def test_settings_of_tf32_in_either_form() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has one form")
    device, before = torch.device("cpu"), matmul.fp32_precision
    seen = []
    try:
        for precision in ("ieee", "tf32"):  # after which `allow_tf32` cannot be read
            matmul.fp32_precision = precision
            seen.append(recording.ambient_settings(device))
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before
    assert seen[0] != seen[1]
    assert recording.ambient_settings(device) != seen[1]


def hold(run: Callable[[], Any]) -> Callable[[], Any]:
    return ReplayWatched(torch.device("cpu"))(run)


@torch.no_grad()
def test_recordings_on_request_hold_what_they_read(copied: None) -> None:
    model, image = small_model(), picture(*SIZE)
    graphs = ModelGraphs(model, [SIZE], hold)
    expected = graphs(image)
    model.set_classes(CLASSES[::-1])
    model.segment(image)
    model.set_classes(CLASSES)
    model.segment(image)
    model.engine.forget()
    assert torch.equal(graphs(image).labels, expected.labels)  # type: ignore[union-attr]


def test_recordings_on_request_end_with_pytorch_s_settings() -> None:
    model, image = small_model(), picture(*SIZE)
    graphs = ModelGraphs(model, [SIZE], hold)
    graphs(image)
    message = "PyTorch's settings of precision and autocast changed since the recording"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=message):
        graphs(image)
    graphs(image)


@torch.no_grad()
def test_threads_that_share_recordings_on_request(copied: None) -> None:
    model = small_model()
    graphs = ModelGraphs(model, [SIZE], hold)
    images = [picture(*SIZE, f"picture {number}") for number in range(4)]
    expected = [model.segment(image) for image in images]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda number: graphs(images[number % 4]), range(16)))
    for number, answer in enumerate(answers):
        torch.testing.assert_close(answer.scores, expected[number % 4].scores, rtol=0, atol=1e-6)  # type: ignore[union-attr]


@torch.no_grad()
def test_a_weight_that_takes_the_place_of_another() -> None:
    """A tensor that is freed leaves its address, and a new one there may have the version that it had."""
    aggregator = make_aggregator()
    engine = Engine(aggregator)
    for module in (aggregator.head, aggregator.conv1, aggregator.layers[0].attention.attention.q):
        memory = np.zeros(module.weight.shape)
        module.weight = nn.Parameter(torch.from_numpy(memory))
        plan, before = engine.plan(), (module.weight.data_ptr(), module.weight._version)
        memory[:] = 1
        module.weight = nn.Parameter(torch.from_numpy(memory))
        assert (module.weight.data_ptr(), module.weight._version) == before
        assert engine.plan() is not plan


@torch.no_grad()
def test_a_plan_stays_while_weights_do() -> None:
    aggregator = make_aggregator()
    engine = Engine(aggregator)
    plan = engine.plan()
    assert engine.plan() is plan
    for module in aggregator.modules():  # other objects, with the same tensors
        module._parameters = dict(module._parameters)  # type: ignore[assignment]
    assert engine.plan() is plan
    aggregator.head.bias.add_(1)
    assert engine.plan() is not plan
