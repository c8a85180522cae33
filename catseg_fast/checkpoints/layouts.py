"""The state dict in a checkpoint of one of the known layouts, under the model's own keys.

Trainers save a state dict together with other values, under a key of their own, and wrappers of a module add
names to its keys:

| wrapper | keys |
| --- | --- |
| `DataParallel`, `DistributedDataParallel`, `AveragedModel`, DeepSpeed | `module.` before each |
| `torch.compile` | `_orig_mod.` after the name of each compiled module |
| Lightning; Lightning's Fabric | `model.` before each, as in its examples; `_forward_module.` |
| FSDP, activation checkpointing | `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.` after names |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catseg_fast.checkpoints.stand_ins import NumpyArray
from catseg_fast.checkpoints.unpickle import shown
from catseg_fast.errors import InputError

# Keys that hold a state dict, in this order, possibly nested.
HOLDERS = ("model", "state_dict", "model_state_dict", "module")
OUTER = ("module", "model", "_forward_module")  # names before every key
INNER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # names anywhere in a key
COUNTERS = {"n_averaged"}  # entries of wrappers besides the model

MAX_TENSORS = 50_000  # the largest published model has 2,000
LONGEST_KEY = 1000


def state_dict_of(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the content of a checkpoint, by the model's own keys.

    Raises:
        InputError: if it is not a state dict, has too many tensors, or two of them get the same key.
    """
    outer = content
    for _ in HOLDERS:
        content = content if (held := _held(content)) is None else held
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict")
    check_count(len(content), path)
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, NumpyArray):
            try:
                value = value.tensor
            except ValueError as error:
                raise InputError(f"{path} is truncated, damaged or of another kind: {error}") from error
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = ", ".join(shown(str(name)) for name in list(outer)[:8])
            raise InputError(
                f"{path} holds no state dict: its entry {shown(repr(key))} is a {type(value).__name__}. "
                f"A state dict is looked for under {', '.join(HOLDERS)}; the file has {found}"
            )
        if not key.isprintable() or len(key) > LONGEST_KEY:
            raise InputError(f"{path} holds no state dict: its entry {shown(key)} is not a parameter's name")
        # A boolean's byte may have any value in a file, but only 0 or 1 in torch.
        tensors[key] = value.view(torch.uint8).ne(0) if value.dtype == torch.bool else value
    return _unwrapped(tensors, path)


def check_count(count: int, path: Path) -> None:
    """Raise an InputError if a file has more entries than any checkpoint."""
    if count > MAX_TENSORS:
        raise InputError(f"{path} holds {count} entries; a checkpoint has at most {MAX_TENSORS}")


def _held(content: Any) -> Mapping[Any, Any] | None:
    """Return the dictionary under a known key; if there are several, one that holds tensors."""
    if not isinstance(content, Mapping):
        return None
    found = [content[key] for key in HOLDERS if isinstance(content.get(key), Mapping)]
    with_tensors = (held for held in found if any(isinstance(x, Tensor | NumpyArray) for x in held.values()))
    return next(with_tensors, found[0] if found else None)


def _unwrapped(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the same tensors, without the names of wrappers in their keys."""
    own = {key: ".".join(name for name in key.split(".") if name not in INNER) for key in tensors}
    while wrapper := _wrapper(own.values()):
        own = {key: name.removeprefix(wrapper) for key, name in own.items() if name not in COUNTERS}
    if len(set(own.values())) < len(own):
        raise InputError(f"{path} holds two tensors whose keys differ only in the names of wrappers")
    return {name: tensors[key] for key, name in own.items()}


def _wrapper(keys: Iterable[str]) -> str | None:
    """Return the prefix that a wrapper has added to every key, except counters."""
    named = [key for key in keys if key not in COUNTERS]
    starts = {key.partition(".")[0] for key in named}
    return next((f"{name}." for name in OUTER if named and starts == {name}), None)
