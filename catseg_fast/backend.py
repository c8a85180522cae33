"""Choice of the aggregator's implementation."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

from catseg_fast.errors import InputError, RunError

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "triton", "torch", "reference")


def check_backend(backend: str) -> str:
    """Return `backend` if it is a known name.

    Raises:
        InputError: if it is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    return backend


def choose_backend(backend: str, device: str | torch.device) -> str:
    """The implementation that a call with `backend` runs on.

    "auto" is "triton" on a GPU and "torch" elsewhere; if Triton cannot run on the GPU, it is "torch" there,
    too, with a warning that says why.

    Raises:
        RunError: if an explicit choice cannot run; the message says why.
    """
    if backend not in ("auto", "triton"):
        return backend
    if backend == "auto" and not str(device).startswith("cuda"):
        return "torch"
    reason = why_no_triton(device)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RunError(f"backend: 'triton' cannot run: {reason}")
    warn_once(f"running in torch, not in Triton: {reason}")
    return "torch"


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def default_device() -> torch.device:
    """The GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def why_no_triton(device: str | torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device; None if they can (or the interpreter on a CPU)."""
    import torch

    try:
        import triton
    except ImportError:
        return "triton is not installed (it exists for Linux only)"
    device = torch.device(device)
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"the model is on {device.type!r}, and Triton kernels need a CUDA GPU"
    from catseg_fast.kernels.launch.checks import too_old

    return too_old(device)
