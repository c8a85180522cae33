"""Update of each pixel's best class with a chunk of maps.

    score = maps resized to H x W;  label = argmax over classes, the first of equal ones

for `maps [t, rows, columns]`, probabilities, or logits whose sigmoid is taken; scores and labels are
`[H, W]`. Maps of H x W pixels never reach memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.label_map.resize import mix, sigmoid, taps
from catseg_fast.kernels.launch import launcher
from catseg_fast.kernels.launch.config import LaunchConfig


@triton.jit(do_not_specialize=["classes", "first", "H", "W", "rows", "columns"])
def update_kernel(
    maps_ptr,  # [t, rows or more, maps_stride_row or less]: probabilities, or logits
    scores_ptr,  # [H, W] fp32: the best so far
    labels_ptr,  # [H, W] int32
    new_scores_ptr,  # [H, W] fp32, output
    new_labels_ptr,  # [H, W] int32, output
    classes,  # t
    first,  # index of the first class
    H,
    W,
    rows,  # visible rows of a map
    columns,
    maps_stride_t,
    maps_stride_row,
    ARE_LOGITS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    m = pixel < H * W
    top, bottom, down = taps(pixel // W, rows, H)
    left, right, across = taps(pixel % W, columns, W)
    best = tl.load(scores_ptr + pixel, mask=m, other=0.0)
    label = tl.load(labels_ptr + pixel, mask=m, other=0)
    p_map = maps_ptr
    for t in range(classes):
        top_left = tl.load(p_map + top * maps_stride_row + left, mask=m, other=0.0).to(tl.float32)
        top_right = tl.load(p_map + top * maps_stride_row + right, mask=m, other=0.0).to(tl.float32)
        bottom_left = tl.load(p_map + bottom * maps_stride_row + left, mask=m, other=0.0).to(tl.float32)
        bottom_right = tl.load(p_map + bottom * maps_stride_row + right, mask=m, other=0.0).to(tl.float32)
        if ARE_LOGITS:
            top_left, top_right = sigmoid(top_left), sigmoid(top_right)
            bottom_left, bottom_right = sigmoid(bottom_left), sigmoid(bottom_right)
        score = mix(top_left, top_right, bottom_left, bottom_right, down, across)
        # As in a maximum over all classes, NaN is larger than every number, and the first NaN is kept.
        better = (score > best) | ((score != score) & (best == best))
        best = tl.where(better, score, best)
        label = tl.where(better, first + t, label)
        p_map += maps_stride_t
    tl.store(new_scores_ptr + pixel, best, mask=m)
    tl.store(new_labels_ptr + pixel, label, mask=m)


@dataclass(frozen=True)
class UpdateConfig(LaunchConfig):
    """Launch config: pixels per program."""

    pixels: int = 256
    num_warps: int = 4


def default_config(device: torch.device) -> UpdateConfig:
    """Return a config for any GPU; in the interpreter, one with few, large programs."""
    return UpdateConfig(16384) if device.type == "cpu" else UpdateConfig()


def launch(
    maps: Tensor,
    scores: Tensor,
    labels: Tensor,
    first: int,
    are_logits: bool,
    config: UpdateConfig,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return new scores and labels `[H, W]` from `maps [t, rows, columns]`, whose columns are contiguous.

    They are written to `out`, which may be the old ones, or to new tensors.
    """
    (t, rows, columns), (height, width) = maps.shape, scores.shape
    if out is None:
        out = scores.new_empty((height, width)), labels.new_empty((height, width))
    new_scores, new_labels = out
    launcher.run(
        update_kernel, (triton.cdiv(height * width, config.pixels),),
        maps, scores, labels, new_scores, new_labels, t, first, height, width, rows, columns,
        *maps.stride()[:2], ARE_LOGITS=are_logits, PIXELS=config.pixels, config=config,
    )  # fmt: skip
    return new_scores, new_labels
