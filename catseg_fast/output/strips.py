"""Rows of large maps, some at a time: what is computed of them on the way takes a bounded memory."""

from __future__ import annotations

STRIP_PIXELS = 2**20


def row_strips(height: int, width: int) -> list[slice]:
    """Return slices that make up all rows of a map `[height, width]`, each of about `STRIP_PIXELS` pixels."""
    step = max(1, STRIP_PIXELS // max(1, width))
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]
