"""Recordings and the CUDA streams that use them, on a stand-in for CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from catseg_fast.engine.recording import GraphCache, Recorder
from support.recorders import ReplayAgain


class FakeCuda:
    """Stands in for what a recorder calls of `torch.cuda`; notes what streams wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[tuple[str, str]] = []
        self.stream = "first"
        for name, value in {
            "is_available": lambda: True, "graph_pool_handle": lambda: (1, 0), "Stream": self.make_stream,
            "device": lambda _: nullcontext(), "stream": lambda _: nullcontext(), "Event": self.make_event,
            "current_stream": lambda *_: self.make_stream(), "CUDAGraph": SimpleNamespace,
            "set_stream": lambda stream: setattr(self, "stream", stream.name), "graph": self.graph,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def make_stream(self) -> Any:
        name = self.stream

        def wait(event: Any) -> None:
            self.notes.append((name, f"waits for {event.of}"))

        return SimpleNamespace(name=name, wait_event=wait, wait_stream=lambda _: None)

    def make_event(self) -> Any:
        event = SimpleNamespace(of=None)
        event.record = lambda stream: setattr(event, "of", stream.name)
        return event

    @contextmanager
    def graph(self, graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # other threads may allocate memory
        self.stream = "capturing"
        yield  # and does not come back to the stream after an error, as PyTorch does not


def test_a_stream_waits_for_the_last_one_that_used_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = Recorder(torch.device("cuda", 0))
    with recorder.turn():
        pass
    assert cuda.notes == []
    cuda.stream = "second"
    with pytest.raises(ValueError, match="in use"), recorder.turn():
        raise ValueError("in use")
    with recorder.turn():
        pass
    assert cuda.notes == [("second", "waits for first"), ("second", "waits for second")]


def test_a_recording_that_fails_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = Recorder(torch.device("cuda", 0), warm_up=0)
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(lambda: [][0] if cuda.stream == "first" else fail_in_capture())
    assert cuda.stream == "first"


def fail_in_capture() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_inputs_are_copied_and_answers_finished_in_turn() -> None:
    notes: list[str] = []

    class Noted(ReplayAgain):
        @contextmanager
        def turn(self) -> Iterator[None]:
            notes.append("turn")
            yield
            notes.append("done")

        def __call__(self, run: Any) -> Any:
            replay = super().__call__(run)
            return lambda: (notes.append("replay"), replay())[1]

    cache = GraphCache(Noted, device_type="cpu")
    for _ in range(3):
        cache("key", [torch.ones(1)], lambda x: x + 1, lambda x: (notes.append("finish"), x.clone())[1])
    assert notes == ["finish", "finish", "turn", "replay", "finish", "done"]
