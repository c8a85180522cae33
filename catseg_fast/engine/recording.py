"""CUDA graphs of equal calls, recorded at the third call and replayed from then on to save work of the host.

A recording reads and writes the same memory at every replay. Nothing in it may depend on a value that the
host reads. Everything but its inputs is constant in it, and must be part of the key.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

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

    def __call__(self, run: Callable[[], Answer]) -> Callable[[], Answer]:
        """Record `run`, after a few calls of it, and return its replay."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(self.warm_up):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                answer = run()

        def replay() -> Answer:
            with torch.cuda.device(self.device):
                graph.replay()
            return answer

        return replay

    @property
    def bytes(self) -> int:
        """Memory that PyTorch holds on the device, including that of the recordings."""
        return torch.cuda.memory_reserved(self.device)

    @property
    def limit(self) -> int:
        """Memory that recordings may hold."""
        return int(SHARE * torch.cuda.get_device_properties(self.device).total_memory)


@dataclass
class _Recording:
    buffers: list[Tensor]
    replay: Callable[[], Any]
    bytes: int


def ambient_settings(device: torch.device) -> tuple[object, ...]:
    """Return PyTorch's settings that change what a recorded call computes."""
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
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
        key = (key, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        with self._lock:
            recording = self._recordings.get(key) or self._count(key, inputs, run)
            if recording is not None:
                self._recordings.move_to_end(key)
                for buffer, x in zip(recording.buffers, inputs, strict=True):
                    buffer.copy_(x)
                self.replays += 1
                self.replayed = True
                return finish(recording.replay())
            self.replayed = False
        return finish(run(*inputs))

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
            self._recordings.clear()
            self._counts.clear()
            self._recorder = None

    def _count(self, key: object, inputs: Sequence[Tensor], run: Callable[..., Any]) -> _Recording | None:
        """Count a call, and record it if it was made often enough."""
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
        self._recordings[key] = recording
        while len(self._recordings) > MOST or sum(self.kept) > self._recorder.limit:
            self._recordings.popitem(last=False)
        return self._recordings.get(key)

    def _record(self, inputs: Sequence[Tensor], run: Callable[..., Any]) -> _Recording:
        if self._recorder is None:
            self._recorder = self._make_recorder(inputs[0].device)
        before = self._recorder.bytes
        with torch.inference_mode(False), torch.no_grad():
            buffers = [torch.empty_like(x) for x in inputs]
            for buffer, x in zip(buffers, inputs, strict=True):
                buffer.copy_(x)
            replay = self._recorder(lambda: run(*buffers))
        return _Recording(buffers, replay, max(0, self._recorder.bytes - before))
