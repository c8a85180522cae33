"""Shapes as signed distances, and the patterns on them; all on a grid in units of the shape's radius."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]


def _disc(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 0.95


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - 0.7) - 0.27


def _square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.82


def _polygon(corners: NDArray[np.float64]) -> Callable[[Field, Field], Field]:
    """Return the signed distance to a polygon `[N, 2]` (x, y): to the nearest edge, negative inside."""

    def distance(x: Field, y: Field) -> Field:
        squared = np.full(np.broadcast(x, y).shape, np.inf, np.float32)
        inside = np.zeros(squared.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
            squared = np.minimum(squared, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
            crosses = (ay > y) != (by > y)
            with np.errstate(divide="ignore", invalid="ignore"):
                inside ^= crosses & (x < (y - ay) / ey * ex + ax)
        return np.where(inside, -1, 1) * np.sqrt(squared)

    return distance


def _corners(count: int, radii: tuple[float, ...]) -> NDArray[np.float64]:
    """Return corners around the origin, starting at the top, at alternating radii."""
    angles = 2 * np.pi * np.arange(count) / count
    radius = np.resize(radii, count)
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], axis=1)


def _cross(x: Field, y: Field) -> Field:
    arms = [np.maximum(np.abs(a) - 0.95, np.abs(b) - 0.32) for a, b in ((x, y), (y, x))]
    return np.minimum(*arms)


def _heart(x: Field, y: Field) -> Field:
    """Return the distance to a square on its corner, with a disc on each of its upper edges."""
    half, x, y = 0.78, np.abs(x), y - np.float32(0.12)
    corner = (x + np.abs(y) - half) / 2**0.5
    return np.minimum(corner, np.hypot(x - half / 2, y + half / 2) - half / 2**0.5)


def _moon(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x, y) - 0.95, 0.72 - np.hypot(x - 0.5, y))


DISTANCES: dict[str, Callable[[Field, Field], Field]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _polygon(_corners(3, (1.08,))),
    "star": _polygon(_corners(10, (1.05, 0.45))),
    "cross": _cross,
    "heart": _heart,
    "moon": _moon,
}


def pattern(name: str, u: Field, v: Field, period: float) -> Field:
    """Return the share of the second colour, 0 or 1, on a grid in pixels along the pattern's axes."""
    if name == "plain":
        return np.zeros(np.broadcast(u, v).shape, np.float32)
    if name == "striped":
        return np.broadcast_to((u % period < period / 2), np.broadcast(u, v).shape).astype(np.float32)
    if name == "checked":
        return ((u % period < period / 2) ^ (v % period < period / 2)).astype(np.float32)
    rows = np.floor(v / period)
    du, dv = (u + period / 2 * (rows % 2)) % period - period / 2, v % period - period / 2
    return (np.hypot(du, dv) < 0.3 * period).astype(np.float32)
