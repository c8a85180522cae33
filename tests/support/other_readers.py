"""Checkpoint files read in another way than the package's, for comparison; not for hostile files."""

from __future__ import annotations

import codecs
import io
import json
import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catseg_fast.checkpoints.layouts import state_dict_of

NUMPY = (
    np._core.multiarray._reconstruct, np._core.multiarray.scalar, np.ndarray, np.dtype, codecs.encode,
    *(type(np.dtype(code)) for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")),
    *(type(np.dtype(code)) for code in ("f2", "f4", "f8")),
)  # fmt: skip
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class NotRead(Exception):
    """The other reader does not read a file."""


def read_otherwise(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, from torch's own reader or by a safetensors file's header.

    Raises:
        NotRead: if that reader cannot.
    """
    try:
        data = path.read_bytes()
        if data[8:9] == b"{" and not data.startswith((b"PK", b"\x80")):
            return state_dict_of(_safetensors(data), path)
        if data.startswith(b"PK"):
            _require_files(data)
        with torch.serialization.safe_globals(list(NUMPY)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return state_dict_of(_as_tensors(torch.load(path, "cpu", weights_only=True)), path)
    except Exception as error:  # any error of that reader
        raise NotRead from error


def _require_files(data: bytes) -> None:
    """Refuse archives with folders: torch leaves memory uninitialised if an entry is marked as a folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(info.external_attr & 0x10 for info in archive.infolist()):
            raise ValueError("a folder")


def _as_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_tensors(item) for key, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _safetensors(data: bytes) -> dict[str, Tensor]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    values = bytearray(data[8 + length :])
    header.pop("__metadata__", None)
    return {key: _tensor(values, **entry) for key, entry in header.items()}


def _tensor(values: bytearray, dtype: str, shape: list[int], data_offsets: list[int], **_: Any) -> Tensor:
    kind, (start, stop) = SAFETENSORS[dtype], data_offsets
    if stop - start != math.prod(shape) * kind.itemsize:
        raise ValueError("other sizes")
    if start == stop:
        return torch.empty(shape, dtype=kind)
    return torch.tensor(values[start:stop], dtype=torch.uint8).view(kind).reshape(shape)
