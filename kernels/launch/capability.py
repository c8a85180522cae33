"""Compute capabilities: those that have default configs, and that of a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Compute capabilities for which default configs are shipped.
CAPABILITIES = (80, 86, 89, 90, 100)

# Workstation GPUs have capabilities from this one on, and the shared memory and matrix instructions of 8.9.
WORKSTATION, LIKE_WORKSTATION = 120, 89


class _Assumed(threading.local):
    capability: int = 90


_assumed = _Assumed()


def capability_of(device: torch.device) -> int:
    """Return the capability whose default configs and kernels run on a device.

    A GPU whose capability is not in `CAPABILITIES` has the next lower one, or 8.9 if it is 12.0 or higher,
    because of its shared memory. The interpreter and the meta device have H100's, or that of `assume`.
    """
    return of_gpu(device) if device.type == "cuda" else _assumed.capability


@cache
def of_gpu(device: torch.device) -> int:
    """Return the `capability_of` a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    if own >= WORKSTATION:
        return LIKE_WORKSTATION
    return max((known for known in CAPABILITIES if known <= own), default=CAPABILITIES[0])


@contextmanager
def assume(capability: int) -> Iterator[None]:
    """Let devices other than GPUs have a capability, in this thread."""
    before, _assumed.capability = _assumed.capability, capability
    try:
        yield
    finally:
        _assumed.capability = before
