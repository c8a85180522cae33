"""Work that runs ahead, in threads, of who uses its results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], count: int
) -> Iterator[Future[R]]:
    """The jobs of `items` in order, of which `count` are under way beyond the one that is yielded."""
    jobs: deque[Future[R]] = deque()
    for item in items:
        jobs.append(pool.submit(work, item))
        if len(jobs) > count:
            yield jobs.popleft()
    yield from jobs
