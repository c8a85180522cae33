"""Compute capabilities of GPUs: those with default configs, and a device's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Compute capabilities for which default configs are shipped.
CAPABILITIES = (80, 86, 89, 90, 100)

# GPUs for workstations, from this capability on: they have 8.9's shared memory and matrix instructions.
WORKSTATION, LIKE_WORKSTATION = 120, 89


class _Assumed(threading.local):
    capability: int = 90


_assumed = _Assumed()


def capability_of(device: torch.device) -> int:
    """Return the capability whose default configs and kernels run on a device.

    For a GPU that is none of `CAPABILITIES`, the next lower one, and 8.9 for those of 12.0 and above, which
    have as little shared memory. In the interpreter and on the meta device, H100's or what `assume` says.
    """
    return of_gpu(device) if device.type == "cuda" else _assumed.capability


@cache
def of_gpu(device: torch.device) -> int:
    """`capability_of` a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    if own >= WORKSTATION:
        return LIKE_WORKSTATION
    return max((known for known in CAPABILITIES if known <= own), default=CAPABILITIES[0])


@contextmanager
def assume(capability: int) -> Iterator[None]:
    """Let devices that are no GPUs have a capability, in this thread."""
    before, _assumed.capability = _assumed.capability, capability
    try:
        yield
    finally:
        _assumed.capability = before
