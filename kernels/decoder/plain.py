"""The decoder in plain torch ops, in any floating type; `op.py` has the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def decode(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
) -> Tensor:
    """`op.decode`."""
    (B, t, _, C), (H, W) = x.shape, resolution
    maps = x.reshape(B * t, H, W, C).permute(0, 3, 1, 2)
    for stage, added in enumerate(guidance):
        phases, scale1, shift1, conv, scale2, shift2 = weights[6 * stage : 6 * stage + 6]
        maps = _upsample(maps, phases, added, t)
        maps = _group_norm_relu(maps, groups[2 * stage], scale1, shift1, eps[2 * stage])
        maps = F.conv2d(maps, _channels_first(conv), padding=1)
        maps = _group_norm_relu(maps, groups[2 * stage + 1], scale2, shift2, eps[2 * stage + 1])
    head, bias = weights[-2:]
    logits = F.conv2d(maps, _channels_first(head), bias, padding=1)
    return logits.view(B, t, *logits.shape[-2:])


def _upsample(maps: Tensor, phases: Tensor, added: Tensor, t: int) -> Tensor:
    """Apply four 2x2 convolutions, one per output phase, and add the guidance `[B or 1, 2H * 2W, out]`."""
    (N, _, H, W), out = maps.shape, added.shape[-1]
    by_phase = _channels_first(phases).unflatten(0, (2, 2, out))
    up = torch.empty(
        (N, out, 2 * H, 2 * W), dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last
    )
    for a in range(2):
        for b in range(2):
            phase = F.conv2d(maps, by_phase[a, b], padding=1)  # has an additional row and column
            up[:, :, a::2, b::2] = phase[:, :, a : a + H, b : b + W]
    guidance = added.unflatten(1, (2 * H, 2 * W)).permute(0, 3, 1, 2)
    up.view(N // t, t, *up.shape[1:]).add_(guidance[:, None])
    return up


def _channels_first(weight: Tensor) -> Tensor:
    """Permute `[out, K, K, in]` to `[out, in, K, K]`."""
    return weight.permute(0, 3, 1, 2)


def _group_norm_relu(maps: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if maps.device.type == "cpu" and maps.dtype in (torch.float32, torch.float64):
        return F.relu_(_group_norm(maps, groups, weight, bias, eps))
    return F.relu_(F.group_norm(maps, groups, weight, bias, eps))


def _group_norm(maps: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise and overwrite `maps`, like `F.group_norm`.

    On a CPU, `F.group_norm` has 5 to 30 times the rounding error on channels-last maps.
    """
    N, C, H, W = maps.shape
    mean = maps.sum(dim=(2, 3), keepdim=True) / (H * W)
    centred = maps.sub_(mean)
    square = centred.square().sum(dim=(2, 3)).view(N, groups, -1) / (H * W)
    of_channel = mean.view(N, groups, -1)
    shift = of_channel - of_channel.mean(dim=-1, keepdim=True)  # from the group's mean to a channel's
    variance = (square + shift.square()).mean(dim=-1, keepdim=True)
    scale = weight.view(1, groups, -1) * (variance + eps).rsqrt()
    offset = bias.view(1, groups, -1) + shift * scale
    return torch.addcmul(offset.view(N, C, 1, 1), centred, scale.view(N, C, 1, 1))
