"""The cost volume and its 7x7 convolution in plain torch ops, in any floating type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_cost_volume(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor, resolution: Sequence[int]
) -> Tensor:
    """`op.embed_cost_volume`."""
    (B, HW, _), (_, t, P, _), (H, W) = image.shape, text.shape, resolution
    weight = weight.permute(0, 3, 1, 2)  # C, P, 7, 7
    cost_volume = image[:, None] @ text.flatten(1, 2).transpose(1, 2)[:, None]  # B, 1, HW, t*P
    cost_volume = cost_volume.view(B, H, W, t, P).permute(0, 3, 4, 1, 2).reshape(B * t, P, H, W)
    if P == 1 and not torch.compiler.is_exporting():  # faster than a convolution, but in no other format
        patches = F.unfold(cost_volume, kernel_size=7, padding=3)  # B*t, 49, HW
        x = F.linear(patches.transpose(1, 2), weight.flatten(1), bias)
    else:
        cost_volume = cost_volume.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(cost_volume, weight, bias, padding=3).permute(0, 2, 3, 1)
    return x.reshape(B, t, HW, len(weight))
