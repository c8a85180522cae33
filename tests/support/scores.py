"""Scores of label maps by their definitions."""

from __future__ import annotations

from torch import Tensor

IGNORE = 255


def slow_scores(pairs: list[tuple[Tensor, Tensor]], classes: int) -> dict[str, float]:
    """Return the scores of pairs of labels and truth, counted pixel by pixel."""
    sets: dict[str, list[set[tuple[int, int]]]] = {
        name: [set() for _ in range(classes)] for name in ("truth", "predicted")
    }
    for number, (labels, truth) in enumerate(pairs):
        for pixel, (label, right) in enumerate(
            zip(labels.flatten().tolist(), truth.flatten().tolist(), strict=True)
        ):
            if right != IGNORE:
                sets["truth"][right].add((number, pixel))
                sets["predicted"][label].add((number, pixel))
    both = list(zip(sets["truth"], sets["predicted"], strict=True))
    present, met = [(t, p) for t, p in both if t], [(t, p) for t, p in both if t | p]
    pixels = sum(len(t) for t, _ in both)
    return {
        "mIoU": sum(len(t & p) / len(t | p) for t, p in present) / len(present),
        "mIoU_union": sum(len(t & p) / len(t | p) for t, p in met) / len(met),
        "fwIoU": sum(len(t) / pixels * len(t & p) / len(t | p) for t, p in present),
        "pACC": sum(len(t & p) for t, p in both) / pixels,
        "mACC": sum(len(t & p) / len(t) for t, p in present) / len(present),
    }
