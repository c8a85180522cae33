"""Store of what is kept of visitors between their calls, within a limit of memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock

from torch import Tensor

from catseg_fast.app.workbench import Loaded
from catseg_fast.inference.segmentation import Segmentation


@dataclass(frozen=True)
class Kept:
    """A visitor's picture as encoded, and the last segmentation of it."""

    loaded: Loaded
    segmentation: Segmentation

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        answer = self.segmentation
        tensors = (self.loaded.photo, answer.labels, answer.scores, answer.logits)
        return self.loaded.encoded.nbytes + sum(x.nbytes for x in tensors if isinstance(x, Tensor))


class Visitors:
    """Store by session; safe for several threads.

    Args:
        most: number of visitors.
        most_bytes: of all of them together.
        seconds: after which what was not used is dropped.
        clock: tells the time in seconds.
    """

    def __init__(
        self, most: int, most_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.most, self.most_bytes, self.seconds, self._clock = most, most_bytes, seconds, clock
        self._kept: OrderedDict[str, tuple[float, Kept]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory that is held for all visitors."""
        return sum(kept.nbytes for _, kept in self._kept.values())

    def get(self, session: str) -> Kept | None:
        """Return what is kept of a visitor."""
        with self._lock:
            self._sweep()
            if session not in self._kept:
                return None
            _, kept = self._kept.pop(session)
            self._kept[session] = (self._clock(), kept)
            return kept

    def put(self, session: str, kept: Kept) -> Kept | None:
        """Keep it, and drop what was not used for the longest time where there is no room.

        Returns:
            What is kept: without logits if there is no room for them; None if there is room for nothing.
        """
        if kept.nbytes > self.most_bytes:
            kept = Kept(kept.loaded, replace(kept.segmentation, logits=None, readout=None))
        with self._lock:
            self._kept.pop(session, None)
            self._sweep()
            if kept.nbytes > self.most_bytes:
                return None
            while self._kept and (len(self) >= self.most or self.nbytes + kept.nbytes > self.most_bytes):
                self._kept.popitem(last=False)
            self._kept[session] = (self._clock(), kept)
        return kept

    def forget(self, session: str) -> None:
        """Drop what is kept of a visitor."""
        with self._lock:
            self._kept.pop(session, None)

    def _sweep(self) -> None:
        before = self._clock() - self.seconds
        while self._kept and next(iter(self._kept.values()))[0] < before:
            self._kept.popitem(last=False)
