"""Telling whether weights have changed since something was derived from them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def weights_state(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """A value that changes when a tensor is replaced, moved, cast, or written in place.

    Writes through `.data` leave no trace and go unnoticed.
    """
    return tuple(
        (tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version)
        for tensor in tensors
    )
