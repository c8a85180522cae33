"""The kernels that a GPU runs in one call: their total time and their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KEPT = 30  # kernels
NAME_LENGTH = 90


def profile_call(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Return the fields `busy`, `launches` and `kernels` of a `Record`; none of them on a CPU.

    Args:
        call: what is profiled; it has been called before.
        device: where it runs.
    """
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize(device)
    return summarise(
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in found.events()
        if event.device_type.name == "CUDA"
    )


def summarise(events: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Return the fields of a `Record` from the name and the seconds of each launch."""
    busy, launches = 0.0, 0
    kernels: dict[str, tuple[float, int]] = {}
    for name, seconds in events:
        busy, launches = busy + seconds, launches + 1
        before, calls = kernels.get(name[:NAME_LENGTH], (0.0, 0))
        kernels[name[:NAME_LENGTH]] = before + seconds, calls + 1
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:KEPT]
    rows = [(name, seconds, calls) for name, (seconds, calls) in longest]
    return {"busy": busy, "launches": launches, "kernels": rows} if launches else {}
