"""Calls that can be stopped: by the visitor, because the visitor has left, or because time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Stopped(BaseException):
    """Raised in a call that was stopped. Not an `Exception`: no code on the way handles it as a failure."""


class Job:
    """A visitor's call of the model.

    Args:
        seconds: that it may take.
        seconds_shared: that it may take if others wait.
        others_wait: tells whether they do.
    """

    def __init__(
        self, seconds: float, seconds_shared: float, others_wait: Callable[[], bool] = lambda: False
    ) -> None:
        self.seconds, self.seconds_shared, self.others_wait = seconds, seconds_shared, others_wait
        self.stopped = False
        self._begin: float | None = None

    def begin(self) -> None:
        """Let its time run from now on."""
        self._begin = time.monotonic()

    def check(self) -> None:
        """Go on only if the job may.

        Raises:
            Stopped: if it was stopped, or its time is up.
        """
        if self.stopped:
            raise Stopped("Stopped.")
        if self._begin is None:
            return
        taken = time.monotonic() - self._begin
        if taken > self.seconds:
            raise Stopped(f"Stopped after {self.seconds:g} s, the most that a call may take here.")
        if taken > self.seconds_shared and self.others_wait():
            raise Stopped(f"Stopped after {taken:.0f} s, as others wait; fewer class names take less time.")


class _Checked(TorchFunctionMode):
    """Mode that looks at a job before operations on tensors in its thread, until it has stopped the job.

    Functions without tensors are left alone, such as the one by which `torch.no_grad` sets the state back.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job: Job | None = job

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._job is not None and any(isinstance(argument, Tensor) for argument in args):
            try:
                self._job.check()
            except Stopped:
                self._job = None  # what cleans up is not stopped again
                raise
        return func(*args, **(kwargs or {}))


class Jobs:
    """The jobs that run or wait for the model, by session; one job at a time has the model.

    Args:
        seconds, seconds_shared, others_wait: of each job.
    """

    def __init__(
        self, seconds: float, seconds_shared: float, others_wait: Callable[[], bool] = lambda: False
    ) -> None:
        self._settings = (seconds, seconds_shared, others_wait)
        self._jobs: dict[str, Job] = {}
        self._model, self._lock = Lock(), Lock()

    @contextmanager
    def running(self, session: str) -> Iterator[Job]:
        """Have the model to oneself; an earlier job of the session is stopped, and its end waited for.

        Raises:
            Stopped: within the block, too, at the next operation on tensors.
        """
        job = Job(*self._settings)
        with self._lock:
            if session in self._jobs:
                self._jobs[session].stopped = True
            self._jobs[session] = job
        try:
            while not self._model.acquire(timeout=0.05):
                job.check()
            try:
                job.check()
                job.begin()
                with _Checked(job):
                    yield job
            finally:
                self._model.release()
        finally:
            with self._lock:
                if self._jobs.get(session) is job:
                    del self._jobs[session]

    def stop(self, session: str) -> None:
        """Stop a session's job, if it has one."""
        with self._lock:
            if session in self._jobs:
                self._jobs[session].stopped = True
