"""Free memory of a device."""

from __future__ import annotations

import psutil
import torch

DEFAULT_POOL = (0, 0)  # id of PyTorch's memory pool for ordinary tensors


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are available on a device.

    On a GPU, memory that PyTorch keeps but does not use counts as free, except what belongs to recordings of
    CUDA graphs: nothing else is allocated there.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free + unused - _unused_in_pools(device))
    return psutil.virtual_memory().available


def _unused_in_pools(device: torch.device) -> int:
    """Return the memory that private pools, such as those of graphs, hold beyond their tensors."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment.get("segment_pool_id", DEFAULT_POOL)) != DEFAULT_POOL
    )
