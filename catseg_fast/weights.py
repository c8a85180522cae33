"""Telling weights apart, and whether they have changed since something was derived from them."""

from __future__ import annotations

import hashlib
import operator
import weakref
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

_VERSION, _DTYPE = operator.attrgetter("_version"), operator.attrgetter("dtype")


def module_tensors(
    module: nn.Module, buffers: bool = False, without: Collection[nn.Module] = ()
) -> list[Tensor]:
    """Return a module's parameters, and its buffers if asked for, including those of submodules.

    `nn.Module.parameters` builds the name of each, which takes longer than all else that a call does before
    it launches its first kernel. What several modules share is listed for each.

    Args:
        module: the module.
        buffers: whether to include buffers.
        without: submodules to leave out.
    """
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [module]
    while modules:
        each = modules.pop()
        if each is not None and each not in without:
            found += each._parameters.values()
            if buffers:
                found += each._buffers.values()
            modules += reversed(each._modules.values())
    return [tensor for tensor in found if tensor is not None]


class WeightsState:
    """A value that is no longer equal after a tensor is replaced, moved, cast, or written in place.

    Writes through `.data` leave no trace and go unnoticed. An address is not enough to tell tensors apart:
    once a tensor is freed, another one may have it.
    """

    __slots__ = ("_references", "_values")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._references = list(map(weakref.ref, tensors))  # of a living tensor, always the same object
        try:
            versions = list(map(_VERSION, tensors))
        except RuntimeError:  # inference tensors have none
            versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        self._values = (versions, list(map(Tensor.data_ptr, tensors)), list(map(_DTYPE, tensors)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightsState):
            return NotImplemented
        same = self._values == other._values
        return same and all(map(operator.is_, self._references, other._references))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[object, ...]:
        return WeightsState, ((),)  # the tensors of a pickle are new ones


def weights_hash(state_dict: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a state dict's names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
