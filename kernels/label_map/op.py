"""Label maps: a chunk's logits become probabilities of pixels, which update the best ones so far.

With a sliding window, `merge.py` computes probabilities of the picture from those of its crops, a few classes
at a time; `update.py` resizes them to the output size and takes the maximum. Without a window there is one
crop, and the visible part of its logits is resized after the sigmoid. Logits are `[B, t, h, w]`; scores and
labels `[H, W]`. Probabilities of single crops and of H x W pixels never reach memory; those of the merged
maps are in scratch memory.

The op computes in fp32, independently of autocast. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels.label_map import merge, plain, update
from catseg_fast.kernels.launch.checks import check_runnable
from catseg_fast.kernels.launch.op import Form, Op, Random, Sizes

# Size of the merged maps that exist at a time: of 40 classes at 640 x 640 pixels.
SCRATCH_BYTES = 2**26


def update_label_map(
    logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    first: int,
    window: Sequence[int],
    visible: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Update a label map with a chunk's logits.

    Args:
        logits: logits `[B, t, h, w]` of all crops, the last of which is the whole picture.
        scores, labels: scores and labels of the best classes so far, `[H, W]`, in fp32 and int32.
        first: index of the chunk's first class.
        window: (R, S, crop size, stride) of a sliding window, or empty.
        visible: (rows, columns) of the only crop that show the picture, where there is no window.

    Returns:
        New scores and labels.

    Raises:
        ValueError: if shapes, types or devices do not fit.
        RuntimeError: if the GPU is too old.
    """
    check_runnable("logits", logits, "ieee")
    crops = plain.count_crops(window) if window else 1
    if logits.ndim != 4 or 0 in logits.shape or len(logits) != crops:
        raise ValueError(f"logits: has shape {list(logits.shape)}; expected [{crops}, t, h, w], all above 0")
    if min(visible) <= 0:
        raise ValueError(f"visible: {tuple(visible)} are not rows and columns above 0")
    if scores.shape != labels.shape or scores.device != logits.device:
        raise ValueError(
            f"scores: is {list(scores.shape)} on {scores.device}; expected {list(labels.shape)}, as labels, "
            f"on {logits.device}, as logits"
        )
    coarse = window[:2] if window else logits.shape[2:]
    if scores.numel() >= 2**31 or any(
        2 * size * few >= 2**31 for size, few in zip(scores.shape, coarse, strict=True)
    ):  # positions are computed in 32 bits
        raise ValueError(
            f"scores: has {list(scores.shape)} pixels; expected less than 2**31, and in each dimension less "
            f"than 2**30 divided by {list(coarse)}, rows and columns of the maps"
        )
    if logits.stride()[2:] != (logits.shape[3], 1):
        logits = logits.contiguous()
    visible = [min(size, seen) for size, seen in zip(logits.shape[2:], visible, strict=True)]
    return OP.call(_update_label_map, logits, scores, labels, first, window, visible)


@torch.library.custom_op("catseg_fast::update_label_map", mutates_args=())
def _update_label_map(
    logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    first: int,
    window: Sequence[int],
    visible: Sequence[int],
) -> tuple[Tensor, Tensor]:
    best: tuple[Tensor, Tensor] = OP.launch(logits, scores, labels, first, window, visible)
    return best


@_update_label_map.register_fake
def _(logits: Tensor, scores: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), labels.new_empty(labels.shape)


def _launch(
    logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    first: int,
    window: Sequence[int],
    visible: Sequence[int],
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    merging, updating = merge.default_config(logits.device), update.default_config(logits.device)
    if not window:
        maps = logits[0, :, : visible[0], : visible[1]]
        return update.launch(maps, scores, labels, first, True, updating)
    step = max(1, SCRATCH_BYTES // (4 * window[0] * window[1]))
    for start in range(0, logits.shape[1], step):
        maps = merge.launch(logits[:, start : start + step], window, merging)
        own = (scores, labels) if start else None
        scores, labels = update.launch(maps, scores, labels, first + start, False, updating, own)
    return scores, labels


def _make_inputs(sizes: Sizes, random: Random) -> dict[str, Any]:
    """Return arguments for a picture of 20 H x 25 W pixels; several crops are upstream's sliding window."""
    (B, t, *_), (height, width) = sizes.state, sizes.resolution
    side = 16 * height
    scores = random.uniform(20 * height, 25 * width) / 2
    return {
        "logits": random.normal(B, t, 4 * height, 4 * width),
        "scores": scores,
        "labels": torch.zeros_like(scores, dtype=torch.int32),
        "first": 3,
        "window": () if B == 1 else (side * 5 // 3, side * 5 // 3, side, side * 2 // 3),
        "visible": (4 * height, 4 * width - 1),
    }


OP = Op(
    name="update_label_map",
    plain=plain.update_label_map,
    triton=update_label_map,
    forms=(Form(_launch),),
    make_inputs=_make_inputs,
    sizes={"sliding window": Sizes(), "whole image": Sizes(crops=1)},
    odd=(Sizes(5, 7, 3, 3), Sizes(1, 33, 3, 2), Sizes(5, 2, 2, 2)),
)
