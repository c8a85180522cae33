"""The data types in which the engine computes."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from catseg_fast.errors import InputError

ROUNDS = 5

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INPUT_PRECISIONS = ("ieee", "tf32x3", "tf32")


def tf32_settings() -> tuple[object, ...]:
    """Return PyTorch's settings of TF32 in products and convolutions on a GPU."""
    return tuple([getattr(owner, name) for owner, name in _precisions()] or _allowances())


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether PyTorch may round the inputs of fp32 products and convolutions on a GPU to TF32."""
    try:
        before = _allowances()
    except RuntimeError:  # the program has set precisions, after which these cannot be read
        switches = _precisions()
        values: list[Any] = ["tf32" if allowed else "ieee"] * len(switches)
        before = [getattr(owner, name) for owner, name in switches]
    else:
        switches = [(backend, "allow_tf32") for backend in _backends()]
        values = [allowed] * len(switches)
    for (owner, name), value in zip(switches, values, strict=True):
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _backends() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, torch.backends.cudnn


def _allowances() -> list[Any]:
    return [backend.allow_tf32 for backend in _backends()]


def _precisions() -> list[tuple[Any, str]]:
    """Return the owners and names of the settings that replace `allow_tf32` since PyTorch 2.9."""
    owners = (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None))
    return [(owner, "fp32_precision") for owner in owners if hasattr(owner, "fp32_precision")]


def check_precision(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return a type that the stages can compute in, or None for the default.

    Raises:
        InputError: if it is not one of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise InputError(f"precision: {dtype!r} is not one of {names}, or None")
    return dtype


def check_input_precision(precision: str) -> str:
    """Return a known precision of products of fp32 numbers.

    Raises:
        InputError: if it is not one of `INPUT_PRECISIONS`.
    """
    if precision not in INPUT_PRECISIONS:
        raise InputError(f"input_precision: {precision!r} is not one of {', '.join(INPUT_PRECISIONS)}")
    return precision


def compute_dtype(asked: torch.dtype | None, weight: torch.Tensor) -> torch.dtype:
    """Return the type in which the stages of an aggregator compute (see `Engine.precision`).

    Args:
        asked: `Engine.precision`.
        weight: a weight of the aggregator.
    """
    if asked is not None:
        return asked
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if device != "cpu" or pays_off_on_cpu(dtype):
            return dtype
    if device == "cuda" and weight.dtype == torch.float32 and not torch.is_grad_enabled():
        return torch.float16
    return weight.dtype


def text_dtype(asked: torch.dtype | None, weight: torch.Tensor, selects: bool) -> torch.dtype:
    """Return the type of the text tower's matrix products, for text features that are kept.

    On a GPU it is that of the aggregator's stages if these have 16 bits, as in upstream's v1. If only the
    best classes are aggregated, it is the weights' type: the selection depends on differences far smaller
    than the rounding of 16 bits.

    Args:
        asked: `Engine.precision`.
        weight: a weight of the text tower.
        selects: whether only the best of the classes are aggregated.
    """
    if selects or weight.device.type != "cuda" or weight.dtype != torch.float32:
        return weight.dtype
    dtype = compute_dtype(asked, weight)
    return dtype if dtype in (torch.float16, torch.bfloat16) else weight.dtype


def image_dtype(asked: torch.dtype | None, weight: torch.Tensor) -> torch.dtype:
    """Type of CLIP's image tower where no gradients are recorded.

    On a GPU it is that of the aggregator's stages if this has 16 bits and the weights are in fp32, which then
    stay as they are. Autocast chooses its own types.

    Args:
        asked: `Engine.precision`.
        weight: a weight of the image tower.
    """
    device = weight.device.type
    if device != "cuda" or weight.dtype != torch.float32 or torch.is_grad_enabled():
        return weight.dtype
    if torch.is_autocast_enabled(device):
        return weight.dtype
    dtype = compute_dtype(asked, weight)
    return dtype if dtype in (torch.float16, torch.bfloat16) else weight.dtype


@functools.cache
def pays_off_on_cpu(dtype: torch.dtype) -> bool:
    """Check whether a matrix product of the stages' size, measured once, is faster on this CPU than in fp32.

    CPUs with AVX512-BF16 or AMX multiply bf16 several times as fast; others emulate it, slowly.
    """
    return _seconds(dtype) < _seconds(torch.float32)


@torch.inference_mode()
def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(8 * 576, 128, dtype=dtype), torch.ones(512, 128, dtype=dtype)
    with torch.autocast("cpu", enabled=False):
        F.linear(x, weight)
        return min(_time(x, weight) for _ in range(ROUNDS))


def _time(x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - start
