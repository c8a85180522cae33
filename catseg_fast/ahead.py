"""Work that runs ahead, in threads, of who uses its results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Room:
    """Room for items of several sizes; an item of any size fits where nothing else is.

    Attributes:
        size: of the room.
        used: sum of the items' sizes.
    """

    size: int
    used: int = 0

    def take(self, size: int) -> bool:
        """Make an item take its place, if there is room for it."""
        if self.used and self.used + size > self.size:
            return False
        self.used += size
        return True

    def leave(self, size: int) -> None:
        """Give an item's place free."""
        self.used -= size


def ahead(
    pool: ThreadPoolExecutor,
    work: Callable[[T], R],
    items: Iterable[T],
    count: int,
    size_of: Callable[[T], int] = lambda item: 0,
    room: Room | None = None,
) -> Iterator[Future[R]]:
    """The jobs of `items` in order, of which `count` are under way beyond the one that is yielded.

    Fewer are under way if together with the one that is yielded they do not fit into `room`.
    """
    room = room or Room(0)
    jobs: deque[tuple[int, Future[R]]] = deque()

    def next_job() -> Iterator[Future[R]]:
        """Yield the first job, and free its place when the next one is asked for."""
        size, job = jobs.popleft()
        yield job
        del job
        room.leave(size)

    for item in items:
        size = size_of(item)
        while not room.take(size):
            yield from next_job()
        jobs.append((size, pool.submit(work, item)))
        if len(jobs) > count:
            yield from next_job()
    while jobs:
        yield from next_job()
