"""Peak memory of a block of code."""

from __future__ import annotations

from threading import Event, Thread
from types import TracebackType

import psutil
import torch
from typing_extensions import Self

_INTERVAL = 0.02  # seconds between two samples


class MemoryMeter:
    """Measures memory: allocations on a GPU exactly, or the process's memory on a CPU in samples.

    Attributes:
        before, peak: bytes at the start, and at the highest since then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self.peak = 0
        self._stop = Event()

    @property
    def taken(self) -> int:
        """Bytes more than at the start."""
        return self.peak - self.before

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = self.peak = torch.cuda.memory_allocated(self.device)
            return self
        process = psutil.Process()
        self.before = self.peak = process.memory_info().rss

        def watch() -> None:
            while not self._stop.wait(_INTERVAL):
                self.peak = max(self.peak, process.memory_info().rss)

        self._thread = Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, psutil.Process().memory_info().rss)
