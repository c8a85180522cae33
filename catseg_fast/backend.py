"""Which implementation of the aggregator runs, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "triton", "torch", "reference")


def check_backend(backend: str) -> str:
    """Return `backend` if it is a known name.

    Raises:
        ValueError: if it is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    return backend


def choose_backend(backend: str, device: str | torch.device) -> str:
    """The implementation that a call with `backend` runs on.

    "auto" is the fastest that can run; at present that is "torch" everywhere.

    Raises:
        RuntimeError: if an explicit choice cannot run; the message says why.
    """
    if backend == "triton":
        raise RuntimeError(f"backend: 'triton' cannot run: this version has no Triton kernels for {device}")
    return "torch" if backend == "auto" else backend


def default_device() -> torch.device:
    """The GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
