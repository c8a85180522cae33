"""A line on the origin of a GPU's launch configs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from catseg_fast.kernels.launch import configs
from catseg_fast.kernels.launch.capability import capability_of
from catseg_fast.kernels.launch.op import Op


def describe(ops: Iterable[Op], device: torch.device, dtype: torch.dtype) -> str:
    """Describe the origin of ops' configs on a GPU at the published sizes: measured, borrowed, or default."""
    found: dict[str, dict[str, None]] = {}  # kernels by origin
    for op in ops:
        for sizes in op.sizes.values():
            calls, _ = op.dry_run(sizes, dtype, "ieee", capability_of(device))
            for call in calls:
                found.setdefault(configs.origin(call.problem, device), {})[call.problem.kernel] = None
    parts = [
        origin if len(found) == 1 else f"{', '.join(kernels)}: {origin}" for origin, kernels in found.items()
    ]
    own = all(origin.startswith("measured") for origin in found)
    return "; ".join(parts) + ("" if own else "; `catseg-fast tune` measures this GPU's own")
