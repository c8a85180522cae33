"""A call whose launches are prepared as one gives the answer of one that runs step by step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast.engine import streaming, torch_stages, whole_call
from catseg_fast.engine.folding import build_plan
from catseg_fast.engine.schedule import Schedule
from catseg_fast.engine.streaming import Stream, run_streams
from catseg_fast.engine.terms import image_terms, vocabulary_terms
from catseg_fast.engine.whole_call import Answer, run_call
from support.aggregators import T, make_aggregator

SIDE = 12


class Together(SimpleNamespace):
    """The stages in torch, as if their launches were prepared; `calls` has what is called as one."""

    def __init__(self, at_once: bool = False, repeats: bool = True) -> None:
        super().__init__(**{name: value for name, value in vars(torch_stages).items() if name != "as_one"})
        self.repeats, self.collects_at_once = repeats, at_once
        self.calls: list[tuple[Any, ...]] = []

    def as_one(self, key: Any, run: Any, *inputs: Tensor | None) -> Tensor:
        self.calls.append(key)
        answer: Tensor = run(*inputs)
        return answer


@pytest.fixture(scope="module")
def aggregator() -> Any:
    return make_aggregator(prompt_channel=1)


def make_stream(aggregator: Any, stages: Any, policy: str, chunk: int, **options: Any) -> Stream:
    plan = build_plan(aggregator, torch.float64)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    maps = [draw(1, channels, scale * SIDE, scale * SIDE) for channels, scale in ((20, 1), (12, 2), (10, 4))]
    image = image_terms(aggregator, plan, draw(1, 24, SIDE, SIDE), maps)
    vocabulary = vocabulary_terms(aggregator, plan, draw(1, T, 1, 24), normalise_prompts=False)
    schedule = Schedule(policy, chunk, "a test", 0, 0, 0)
    selected = options.pop("selected", None)
    stream = Stream(stages, plan, image, vocabulary, selected, schedule, **options)
    stream.spectra = None
    return stream


def new_answer() -> Answer:
    return Answer(torch.full((1, T, 4 * SIDE, 4 * SIDE), torch.nan, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("policy", "chunk"), [("resident", T), ("resident", 2), ("recompute", 3)])
def test_a_call_that_writes_to_one_tensor(aggregator: Any, policy: str, chunk: int, at_once: bool) -> None:
    expected, actual = new_answer(), new_answer()
    stages = Together(at_once)
    run_streams([make_stream(aggregator, Together(at_once, repeats=False), policy, chunk)], expected)
    run_call([make_stream(aggregator, stages, policy, chunk)], actual)
    assert [key[0] for key in stages.calls if key[0] == "call"] == ["call"]
    assert torch.equal(actual.logits, expected.logits)


@torch.no_grad()
@pytest.mark.parametrize(("chunk", "as_one"), [(T, True), (2, False)])
def test_a_consumer_of_steps(aggregator: Any, chunk: int, as_one: bool) -> None:
    expected, stages = new_answer(), Together()
    run_streams([make_stream(aggregator, torch_stages, "resident", chunk)], expected)
    parts: list[tuple[slice, Tensor]] = []
    stream = make_stream(aggregator, stages, "resident", chunk)
    run_call([stream], lambda classes, logits: parts.append((classes, logits)))
    assert ("call" in [key[0] for key in stages.calls]) is as_one
    assert len(parts) == -(-T // chunk)
    for classes, logits in parts:
        assert torch.equal(logits, expected.logits[:, classes])


@torch.no_grad()
def test_selected_classes_are_not_one_call(aggregator: Any) -> None:
    selected = torch.tensor([[0, 2]])
    expected, actual, stages = new_answer(), new_answer(), Together()
    run_streams([make_stream(aggregator, torch_stages, "resident", 2, selected=selected)], expected)
    run_call([make_stream(aggregator, stages, "resident", 2, selected=selected)], actual)
    assert "call" not in [key[0] for key in stages.calls]
    assert torch.equal(actual.logits, expected.logits)


@torch.no_grad()
def test_a_call_of_many_steps_is_not_one(aggregator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_call, "STEPS", 4)
    for chunk, as_one in ((2, True), (1, False)):
        stages = Together()
        run_call([make_stream(aggregator, stages, "resident", chunk)], new_answer())
        assert ("call" in [key[0] for key in stages.calls]) is as_one


@torch.no_grad()
def test_memory_that_runs_out_for_all_launches_at_once(aggregator: Any) -> None:
    """They have one allocation; step by step, the same call may fit."""

    class Full(Together):
        def as_one(self, key: Any, run: Any, *inputs: Tensor | None) -> Tensor:
            if key[0] == "call":
                run(*inputs)  # part of it may have run
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().as_one(key, run, *inputs)

    expected, actual = new_answer(), new_answer()
    run_streams([make_stream(aggregator, torch_stages, "resident", 2)], expected)
    run_call([make_stream(aggregator, Full(), "resident", 2)], actual)
    assert torch.equal(actual.logits, expected.logits)


@torch.no_grad()
def test_memory_that_runs_out_inside_is_not_prepared_in_smaller_steps(aggregator: Any) -> None:
    stages, largest = Together(), []

    def decode(*arguments: Any) -> Tensor:
        classes = arguments[2].shape[1]
        largest.append(classes)
        if classes > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch_stages.decode(*arguments)

    stages.decode = decode
    expected, actual = new_answer(), new_answer()
    run_streams([make_stream(aggregator, torch_stages, "resident", T)], expected)
    with pytest.warns(RuntimeWarning, match="out of memory with 5 classes per step: continuing with fewer"):
        run_call([make_stream(aggregator, stages, "resident", T)], actual)
    assert largest == [5, 5, 2, 2, 1]
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-11, atol=1e-11)


def test_a_graph_is_not_recorded_in_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda value=capturing: value)
        assert streaming.may_continue(full, on_gpu) is not capturing
        assert streaming.may_continue(full, torch.ones(1))
    assert not streaming.may_continue(RuntimeError("illegal memory access"), torch.ones(1))


@torch.no_grad()
def test_other_errors_are_the_callers(aggregator: Any) -> None:
    class Broken(Together):
        def as_one(self, key: Any, run: Any, *inputs: Tensor | None) -> Tensor:
            raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_call([make_stream(aggregator, Broken(), "resident", T)], new_answer())
