"""Cache of small tensors that depend only on weights or sizes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

Value = TypeVar("Value")

MOST = 64  # values per owner

_values: weakref.WeakKeyDictionary[object, dict[object, object]] = weakref.WeakKeyDictionary()


def kept(owner: object, key: object, device: torch.device, make: Callable[[], Value]) -> Value:
    """Return `make()`, or its result of an earlier call.

    Nothing is kept while a graph is traced or recorded, as its tensors have no values yet.

    Args:
        owner: object, identified by identity, that lives as long as the value may be kept.
        key: everything else that the value depends on.
        device: device of the value.
        make: computes the value from tensors that need no gradient.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return make()
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make()
    values = _values.setdefault(owner, {})
    if key not in values:
        if len(values) >= MOST:
            values.clear()
        with torch.inference_mode(False), torch.no_grad():  # it must serve calls in every mode
            values[key] = make()
    return values[key]  # type: ignore[return-value]
