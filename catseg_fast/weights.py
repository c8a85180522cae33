"""Telling weights apart, and whether they have changed since something was derived from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def module_tensors(module: nn.Module, buffers: bool = False) -> list[Tensor]:
    """Return a module's parameters, and its buffers if asked for, inside of children, too.

    `nn.Module.parameters` makes each one's name on the way, which takes longer than all else that a call does
    before it launches its first kernel. What several modules share is listed for each.
    """
    found: list[Tensor | None] = []
    _collect(module, buffers, found)
    return [tensor for tensor in found if tensor is not None]


def _collect(module: nn.Module, buffers: bool, found: list[Tensor | None]) -> None:
    found += module._parameters.values()
    if buffers:
        found += module._buffers.values()
    for child in module._modules.values():
        if child is not None:
            _collect(child, buffers, found)


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
