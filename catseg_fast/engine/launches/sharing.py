"""Layout of a function's buffers in one allocation."""

from __future__ import annotations

from collections.abc import Sequence

from catseg_fast.engine.launches.places import Step

ALIGNMENT = 256  # bytes, of buffers in the shared allocation


def share(steps: Sequence[Step], sizes: Sequence[int], apart: set[int]) -> tuple[int, dict[int, int]]:
    """Lay out buffers in one allocation, the largest first, without overlap of those that live together.

    Args:
        steps: launches in order.
        sizes: bytes of each buffer.
        apart: buffers outside the allocation.

    Returns:
        The size of the allocation in bytes, and the first byte of each buffer.
    """
    lives: dict[int, tuple[int, int]] = {}
    for number, step in enumerate(steps):
        for place in step.places:
            if place.buffer not in apart:
                first, _ = lives.get(place.buffer, (number, number))
                lives[place.buffer] = (first, number)
    starts: dict[int, int] = {}
    for buffer in sorted(lives, key=lambda buffer: -sizes[buffer]):
        first, last = lives[buffer]
        start = 0
        for begin, end in sorted(
            (starts[other], starts[other] + sizes[other])
            for other in starts
            if lives[other][0] <= last and first <= lives[other][1]
        ):
            if start + sizes[buffer] <= begin:
                break
            start = max(start, -(-end // ALIGNMENT) * ALIGNMENT)
        starts[buffer] = start
    return max((start + sizes[buffer] for buffer, start in starts.items()), default=0), starts
