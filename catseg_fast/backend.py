"""Which implementation of the aggregator runs, and why."""

from __future__ import annotations

BACKENDS = ("auto", "triton", "torch", "reference")


def check_backend(backend: str) -> str:
    """Return `backend` if it is a known name.

    Raises:
        ValueError: if it is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    return backend


def choose_backend(backend: str) -> str:
    """The implementation that a call with `backend` runs on; "auto" takes the fastest that can.

    Raises:
        RuntimeError: if an explicit choice cannot run; the message says why.
    """
    if backend == "triton":
        raise RuntimeError("backend: 'triton' cannot run: this version has no Triton kernels yet")
    return "torch" if backend == "auto" else backend
