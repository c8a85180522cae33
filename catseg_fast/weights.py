"""Telling weights apart, and whether they have changed since something was derived from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def weights_state(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """A value that changes when a tensor is replaced, moved, cast, or written in place.

    Writes through `.data` leave no trace and go unnoticed.
    """
    return tuple(
        (tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version)
        for tensor in tensors
    )


def weights_hash(state_dict: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a state dict's names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
