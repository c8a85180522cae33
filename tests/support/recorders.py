"""Recorders of calls on a CPU, with the interface and the pitfalls of the one for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catseg_fast.engine.engine import Engine
from catseg_fast.engine.recording import GraphCache


class ReplayAgain:
    """Runs the call again into the memory of the first answer, as a CUDA graph does."""

    bytes, limit = 0, 2**30

    def __init__(self, device: torch.device) -> None:
        self.device, self.recorded = device, 0

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        answer = run()

        def replay() -> Any:
            again = run()
            if isinstance(answer, Tensor):
                return answer.copy_(again)
            answer.scores.copy_(again.scores)
            answer.labels.copy_(again.labels)
            return answer

        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield


class _Reads(TorchDispatchMode):
    """Notes the memory that operations read and did not allocate."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Tensor] = []  # kept, so that no other memory has their addresses
        self._own: set[int] = set()
        self.read: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._own:
                self.read[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.read:
                self._own.add(x.untyped_storage()._cdata)
                self._made.append(x)
        return out


class ReplayWatched(ReplayAgain):
    """Fails at a replay if memory that the recording reads was freed; a CUDA graph would read garbage."""

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        run()  # computes what is kept, such as text features
        reads = _Reads()
        with reads:
            run()
        read = list(reads.read.values())
        del reads
        replay = super().__call__(run)

        def watched() -> Any:
            freed = sum(storage.expired() for storage in read)
            assert not freed, f"the recording reads {len(read)} tensors, of which {freed} were freed"
            return replay()

        return watched


def recorded(engine: Engine, make_recorder: Any = ReplayAgain) -> GraphCache:
    """Let an engine record calls on a CPU."""
    engine.recordings = GraphCache(make_recorder, device_type="cpu")
    return engine.recordings
