"""Checkpoints: read, load and convert them. Nothing here ever runs code from a file, nor trusts it.

Upstream publishes detectron2 checkpoints, `{"model": state_dict, …}`; plain state dicts, those of other
trainers (`layouts.py`) and safetensors are read as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from catseg_fast._version import __version__
from catseg_fast.checkpoints.hub import WEIGHTS, resolve
from catseg_fast.checkpoints.layouts import check_count, state_dict_of
from catseg_fast.checkpoints.recognise import describe, recognise_variant
from catseg_fast.checkpoints.torch_file import LONGEST_REASON, PICKLE, ZIP, read_torch_file
from catseg_fast.checkpoints.unpickle import shown
from catseg_fast.checkpoints.write import write_weights
from catseg_fast.errors import InputError
from catseg_fast.files import open_regular

__all__ = ["IGNORED_KEYS", "convert", "load_into", "read_checkpoint", "recognise_variant", "resolve"]

# Buffers that follow from the configuration: upstream stores the first line's (and forks the others'), and
# a checkpoint or a model may have them or not. Every other key must agree.
IGNORED_KEYS = re.compile(
    r"(^|\.)(attn_mask|relative_position_index"
    r"|pixel_mean|pixel_std|clip_pixel_mean|clip_pixel_std|input_resolution|context_length|vocab_size)$"
)

MAX_HEADER = 16 * 2**20  # bytes; that of the largest published model has 0.3 MB
MOST_SHARING = 4  # times that a file's bytes may be in its tensors


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a checkpoint file, on the CPU in the file's dtypes, mapped into memory if possible.

    The format is recognised by the content, not the name. What DataParallel, torch.compile, Lightning,
    DeepSpeed and others put around a state dict or before its keys is taken off.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file is empty, truncated, no checkpoint, or a pickle that would run code.
    """
    path = Path(path)
    with open_regular(path) as file:
        head = file.read(64)
        if not head:
            raise InputError(f"{path} is empty")
        if head.startswith(b"version https://git-lfs"):
            raise InputError(f"{path} is a Git LFS pointer, not the checkpoint itself: run `git lfs pull`")
        if head[8:9] != b"{" and not head.startswith((ZIP, PICKLE)):
            raise InputError(f"{path} is neither a PyTorch nor a safetensors checkpoint")
        size = os.fstat(file.fileno()).st_size
        if _is_safetensors(head, size) or not head.startswith((ZIP, PICKLE)):
            content = _read_safetensors(file, path)
        else:
            content = read_torch_file(file, path)
    tensors = state_dict_of(content, path)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if needed > MOST_SHARING * size:  # many tensors on one storage
        raise InputError(f"{path} is damaged: its tensors have {needed} bytes, the file {size}")
    return tensors


def _is_safetensors(head: bytes, size: int) -> bool:
    """Check whether a file of `size` bytes starts with the length of a header that fits in, and a header.

    Where that length is 128 (modulo 256) its first byte is also that of a pickle.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _read_safetensors(file: BinaryIO, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose header is measured before the library reads it."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise InputError(f"{path} is damaged: its header has {length} bytes; at most {MAX_HEADER} are read")
    try:
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise InputError("the header is no JSON object")
        check_count(len(header), path)
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, RecursionError, TypeError, RuntimeError) as error:
        if str(error).startswith(str(path)):
            raise
        reason = shown(str(error), LONGEST_REASON)  # which can have names from the file
        raise InputError(f"{path} is a truncated or damaged safetensors file: {reason}") from error


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "the checkpoint") -> None:
    """Copy a checkpoint into a model, all or nothing: keys and shapes must agree but for `IGNORED_KEYS`.

    Values take the model's dtypes and devices. A model on the meta device gets copies of the tensors,
    and of the derived buffers too.

    Args:
        source: what to call the checkpoint in an error.

    Raises:
        InputError: if anything disagrees; the model is as before.
    """
    expected = model.state_dict()
    # On the meta device a derived buffer has no value to stay with.
    meta = {key for key, value in expected.items() if value.is_meta}
    ignored = {key for key in (*expected, *state_dict) if IGNORED_KEYS.search(key)} - meta
    missing = [key for key in expected if key not in state_dict and key not in ignored]
    unexpected = [key for key in state_dict if key not in expected and key not in ignored]
    taken: dict[str, Tensor] = {}
    mismatched = []
    for key in expected.keys() & state_dict.keys():
        want, found = expected[key], state_dict[key]
        if want.shape == found.shape and want.is_floating_point() == found.is_floating_point():
            taken[key] = found
        elif key not in ignored:
            mismatched.append(f"{key}: expected {_signature(want)}, found {_signature(found)}")
    if missing or unexpected or mismatched:
        variant = getattr(model, "variant", None)
        lines = [
            f"{source} does not fit the model. The file looks like {describe(state_dict)}; "
            f"the model is {variant.name if variant else describe(expected)}.",
            *_listing("missing from the file", missing),
            *_listing("not in the model", unexpected),
            *_listing("of another shape or type", sorted(mismatched)),
        ]
        raise InputError("\n".join(lines))
    if meta:
        taken = {key: value.to(expected[key].dtype, copy=True) for key, value in taken.items()}
    model.load_state_dict(taken, strict=False, assign=bool(meta))


def _signature(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listing(title: str, items: list[str], limit: int = 8) -> list[str]:
    more = [f"    … and {len(items) - limit} more"] if len(items) > limit else []
    return [f"  {len(items)} {title}:", *(f"    {item}" for item in items[:limit]), *more] if items else []


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a CAT-Seg checkpoint as safetensors or, by the target's suffix, as upstream's `{"model": …}`.

    The target appears whole or not at all; dtypes and keys stay as they are.

    Raises:
        InputError: if the source is not a CAT-Seg checkpoint, or the target has another suffix or is the
            source.
    """
    source, target = resolve(source), Path(target).expanduser()
    if target.suffix not in WEIGHTS:
        raise InputError(f"target: {target} must end in one of {', '.join(WEIGHTS)}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"target: there is no folder {target.parent}")
    if target.is_dir() or (target.exists() and target.samefile(source)):
        raise InputError(f"target: {target} is {'a folder' if target.is_dir() else 'the source itself'}")
    tensors = read_checkpoint(source)
    try:
        metadata = {"format": "pt", "variant": recognise_variant(tensors).name, "catseg_fast": __version__}
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    tensors = _own_storage(tensors)
    write_weights(target, tensors, metadata)
    return target


def _own_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors, contiguous, each with its own storage, as safetensors requires."""
    seen: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        shared = storage.data_ptr() in seen
        own[key] = tensor if whole and not shared else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    return own
