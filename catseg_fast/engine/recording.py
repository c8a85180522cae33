"""CUDA graphs of equal calls, recorded at the third call and replayed from then on to save work of the host.

A recording reads and writes the same memory at every replay. Nothing in it may depend on a value that the
host reads. Everything but its inputs is constant in it, and must be part of the key.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from catseg_fast.engine.precision import tf32_settings
from catseg_fast.engine.schedule import format_bytes
from catseg_fast.errors import InputError, RunError

Answer = TypeVar("Answer")
Result = TypeVar("Result")
Record = Callable[[Callable[[], Any]], Callable[[], Any]]

SETTINGS = ("auto", "off")
AFTER = 2  # equal calls before one is recorded
MOST = 4  # recordings that are kept
MOST_KEYS = 64  # different calls that are counted
SHARE = 0.25  # share of the device's memory that recordings may hold
WARM_UP = 3


class Recorder:
    """Makes CUDA graphs that share their memory: a replay of any graph overwrites the last answer.

    Args:
        device: a CUDA GPU.
        warm_up: number of calls before the recording, in which kernels are compiled and checked.

    Raises:
        RunError: if the device is not a CUDA GPU.
    """

    def __init__(self, device: torch.device, warm_up: int = WARM_UP) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            raise RunError(
                f"cuda_graph: needs a CUDA GPU; the model is on {str(device)!r}, with torch "
                f"{torch.__version__} {build}"
            )
        self.device, self.warm_up, self.pool = device, warm_up, torch.cuda.graph_pool_handle()
        self._done: Any = None  # event of the last use

    def __call__(self, run: Callable[[], Answer]) -> Callable[[], Answer]:
        """Record `run`, after a few calls of it, and return its replay."""
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(self.warm_up):
                    run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may allocate memory meanwhile.
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    answer = run()
            finally:
                torch.cuda.set_stream(current)  # a recording that fails may leave its own

        def replay() -> Answer:
            with torch.cuda.device(self.device):
                graph.replay()
            return answer

        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Order the use of recordings, which share memory, among streams.

        Inside, inputs are copied, a recording is replayed, and its answer is copied.
        """
        stream = torch.cuda.current_stream(self.device)
        if self._done is None:
            self._done = torch.cuda.Event()
        else:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    @property
    def bytes(self) -> int:
        """Memory that PyTorch holds on the device, including that of the recordings."""
        return torch.cuda.memory_reserved(self.device)

    @property
    def limit(self) -> int:
        """Memory that recordings may hold."""
        return int(SHARE * torch.cuda.get_device_properties(self.device).total_memory)


@contextmanager
def recordable() -> Iterator[None]:
    """Set PyTorch's modes for a recording, which serves calls in every mode.

    Autocast must not cache what it casts: a recording would read it after autocast has ended.
    """
    cached = torch.is_autocast_cache_enabled()
    with torch.inference_mode(False), torch.no_grad():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@dataclass
class _Recording:
    buffers: list[Tensor]
    replay: Callable[[], Any]
    bytes: int


def ambient_settings(device: torch.device) -> tuple[object, ...]:
    """Return PyTorch's settings that change what a recorded call computes."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        tf32_settings(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )


def check_graphs(setting: str) -> str:
    """Return a valid setting of `Engine.graphs`.

    Raises:
        InputError: if it is not one of `SETTINGS`.
    """
    if setting not in SETTINGS:
        raise InputError(f"graphs: {setting!r} is not one of {', '.join(SETTINGS)}")
    return setting


class GraphCache:
    """Counts equal calls, records them, and replays the recordings; safe for several threads.

    Args:
        make_recorder: makes a recorder for a device, such as `Recorder`.
        device_type: type of the devices whose calls can be recorded.

    Attributes:
        replays: how many calls were answered by a recording.
        replayed: whether the last call was; None before the first one.
    """

    def __init__(
        self, make_recorder: Callable[[torch.device], Any] | None = None, device_type: str = "cuda"
    ) -> None:
        self._make_recorder = make_recorder or (lambda device: Recorder(device, warm_up=1))
        self.device_type = device_type
        self._recorder: Any = None
        self._device: torch.device | None = None  # of the recorder
        self._counts: OrderedDict[object, int] = OrderedDict()
        self._recordings: OrderedDict[object, _Recording] = OrderedDict()
        self._lock = threading.Lock()
        self._state: object = None
        self._states = 0
        self.replays = 0
        self.replayed: bool | None = None

    def __call__(
        self,
        key: object,
        inputs: Sequence[Tensor],
        run: Callable[..., Answer],
        finish: Callable[[Answer], Result],
    ) -> Result:
        """Return `finish(run(*inputs))`, from a recording as of the third call with an equal key.

        Args:
            key: everything that the answer depends on besides the inputs' values; hashable, compared by `==`.
            inputs: tensors on one device.
            run: computes the answer; must not wait for the device.
            finish: copies the answer, which the next replay overwrites.
        """
        full = _with_layouts(key, inputs)
        with self._lock:
            recording = self._recordings.get(full) or self._count(full, inputs, run)
            if recording is not None:
                return self._replay(full, recording, inputs, finish)
            self.replayed = False
        return finish(run(*inputs))

    def replay(
        self, key: object, inputs: Sequence[Tensor], finish: Callable[[Answer], Result]
    ) -> Result | None:
        """Return the answer of a recording, or None if there is none; arguments as in a call."""
        full = _with_layouts(key, inputs)
        with self._lock:
            recording = self._recordings.get(full)
            return None if recording is None else self._replay(full, recording, inputs, finish)

    def _replay(
        self, full: object, recording: _Recording, inputs: Sequence[Tensor], finish: Callable[..., Result]
    ) -> Result:
        self._recordings.move_to_end(full)
        with self._recorder.turn():
            for buffer, x in zip(recording.buffers, inputs, strict=True):
                buffer.copy_(x)
            self.replays += 1
            self.replayed = True
            return finish(recording.replay())

    def serves(self, device: torch.device) -> bool:
        """Check whether a call on a device can be recorded now."""
        if device.type != self.device_type or torch.compiler.is_compiling():
            return False
        return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()

    def number(self, state: object) -> int:
        """Return a number that stands for a state in keys; another one after each change.

        The state of all weights takes longer to look up than a recording.
        """
        with self._lock:
            if state != self._state:
                self._state, self._states = state, self._states + 1
            return self._states

    def describe(self) -> str:
        """Return whether the last call was replayed, and what the recordings hold."""
        last = "no call yet"
        if self.replayed is not None:
            last = f"the last call was {'' if self.replayed else 'not '}replayed"
        held = f"{len(self.kept)} of at most {MOST} recordings hold {format_bytes(sum(self.kept))}"
        if self._recorder is not None:
            held += f" of at most {format_bytes(self._recorder.limit)}"
        return f"{last}, {self.replays} in all; {held}"

    @property
    def kept(self) -> list[int]:
        """Return the bytes that each recording holds, the least recently used first."""
        return [recording.bytes for recording in self._recordings.values()]

    def clear(self) -> None:
        """Drop all recordings, and forget the calls."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._recordings.clear()
        self._counts.clear()
        self._recorder = self._device = None

    def _count(self, key: object, inputs: Sequence[Tensor], run: Callable[..., Any]) -> _Recording | None:
        """Count a call, and record it if it was made often enough."""
        if inputs[0].device != self._device and self._recorder is not None:  # the model was moved
            self._clear()
        count = self._counts.pop(key, 0)
        self._counts[key] = count + 1
        while len(self._counts) > MOST_KEYS:
            self._counts.popitem(last=False)
        if count != AFTER:
            return None
        try:
            recording = self._record(inputs, run)
        except Exception as error:  # many types, depending on the operation that cannot be recorded
            warnings.warn(f"graphs: not recorded, calls run as before: {error}", RuntimeWarning, stacklevel=5)
            return None
        if recording.bytes > self._recorder.limit:
            return None
        self._recordings[key] = recording
        while len(self._recordings) > MOST or sum(self.kept) > self._recorder.limit:
            self._recordings.popitem(last=False)
        return self._recordings.get(key)

    def _record(self, inputs: Sequence[Tensor], run: Callable[..., Any]) -> _Recording:
        if self._recorder is None:
            self._device = inputs[0].device
            self._recorder = self._make_recorder(inputs[0].device)
        before = self._recorder.bytes
        with recordable():
            buffers = [torch.empty_like(x) for x in inputs]
            for buffer, x in zip(buffers, inputs, strict=True):
                buffer.copy_(x)
            replay = self._recorder(lambda: run(*buffers))
        return _Recording(buffers, replay, max(0, self._recorder.bytes - before))


def _with_layouts(key: object, inputs: Sequence[Tensor]) -> tuple[object, ...]:
    return (key, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
