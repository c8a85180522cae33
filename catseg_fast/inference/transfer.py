"""Pictures and answers on their way between the host and a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the host to a GPU through pinned memory, without waiting."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one device on the CPU; of a GPU, after one wait for all of them.

    The copies are not in pinned memory, of which there is little: callers may keep them.
    """
    if tensors[0].device.type != "cuda":
        return [x.cpu() for x in tensors]
    pinned = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for target, x in zip(pinned, tensors, strict=True):
        target.copy_(x, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [x.clone() for x in pinned]
