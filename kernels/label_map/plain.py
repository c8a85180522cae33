"""Label maps in plain torch ops, in any floating type; `op.py` and the kernels have the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def update_label_map(
    logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    first: int,
    window: Sequence[int],
    visible: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`op.update_label_map`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return best_classes(read_out(logits, scores.shape, window, visible), scores, labels, first)


def read_out(logits: Tensor, size: Sequence[int], window: Sequence[int], visible: Sequence[int]) -> Tensor:
    """Return probabilities `[t, *size]` of `logits [B, t, h, w]`; arguments as in `op.update_label_map`."""
    return _resize(coarse_probabilities(logits, window, visible)[None], size)[0]


def coarse_probabilities(logits: Tensor, window: Sequence[int], visible: Sequence[int]) -> Tensor:
    """Return probabilities `[t, R, S]`, before they are resized to the answer's size."""
    if window:
        return _merge(logits, window)
    return logits[0].sigmoid()[..., : visible[0], : visible[1]]


def resize_rows(wide: Tensor, height: int, rows: slice) -> Tensor:
    """Rows of `wide [t, R, W]` resized to `[t, height, W]`; equal to the whole's but for rounding."""
    position = torch.arange(rows.start, rows.stop, device=wide.device, dtype=wide.dtype) + 0.5
    position = (position * (wide.shape[1] / height) - 0.5).clamp_(min=0)
    above = position.long()
    below = (above + 1).clamp_(max=wide.shape[1] - 1)
    share = (position - above)[:, None]
    return (wide[:, above] * (1 - share)).addcmul_(wide[:, below], share)


def best_classes(probabilities: Tensor, scores: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return the best of the previous classes and of `first`, `first + 1`, … in `probabilities [t, H, W]`."""
    best, index = probabilities.max(dim=0)
    # As in a maximum over all classes, NaN is larger than every number, and the first NaN is kept.
    better = (best > scores) | (best.isnan() & ~scores.isnan())
    return torch.where(better, best, scores), torch.where(better, index.int() + first, labels)


def count_crops(window: Sequence[int]) -> int:
    """Return the number of crops of a sliding window, including the whole picture."""
    rows, columns, side, stride = window
    return len(_starts(rows, side, stride)) * len(_starts(columns, side, stride)) + 1


def _merge(logits: Tensor, window: Sequence[int]) -> Tensor:
    """Average the probabilities of overlapping crops, then with those of the whole picture: `[t, R, S]`."""
    rows, columns, side, stride = window
    *crops, whole = _resize(logits, (side, side)).sigmoid()
    total, count = whole.new_zeros(len(whole), rows, columns), whole.new_zeros(rows, columns)
    corners = [(top, left) for top in _starts(rows, side, stride) for left in _starts(columns, side, stride)]
    for (top, left), crop in zip(corners, crops, strict=True):
        total[:, top : top + side, left : left + side] += crop
        count[top : top + side, left : left + side] += 1
    return (total / count + _resize(whole[None], (rows, columns))[0]) / 2


def _starts(size: int, side: int, stride: int) -> list[int]:
    """Return the first positions of crops; the last crop ends at the border."""
    return [min(start, size - side) for start in range(0, size - side + stride, stride)]


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
