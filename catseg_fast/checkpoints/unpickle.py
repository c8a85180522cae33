"""Reading what `torch.save` wrote as data: no function named in the file is ever called.

`torch.load(weights_only=True)` builds tensors and containers only. detectron2 stores numpy arrays and numbers
as well; numpy's own unpickling trusts its input (a forged dtype corrupts memory), so plain classes stand in.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ZIP, PICKLE = b"PK", b"\x80"  # how files of torch.save start, and how plain pickles do
# Files older than the zip format are pickles that start with this number.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


class NumpyDtype:
    """Stands in for `numpy.dtype`: numbers and booleans only."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise ValueError(f"numpy arrays of type {code} are not supported")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class NumpyArray:
    """Stands in for `numpy.ndarray`; `array` is what it would be."""

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        array = np.ndarray(shape, dtype.dtype, buffer=data, order="F" if fortran else "C")
        self.array = array.astype(array.dtype.newbyteorder("="), order="C")


def _array(*_: object) -> NumpyArray:
    return NumpyArray()


def _scalar(dtype: NumpyDtype, data: bytes) -> Any:
    return np.ndarray((), dtype.dtype, buffer=data).item()


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (NumpyDtype, "numpy.dtype"),
    (NumpyArray, "numpy.ndarray"),
    *(
        (function, f"{module}.multiarray.{name}")
        for module in ("numpy.core", "numpy._core")  # numpy 1, numpy 2
        for function, name in ((_array, "_reconstruct"), (_scalar, "scalar"))
    ),
]


def unpickle(path: Path) -> Any:
    """The content of a file of `torch.save`, on the CPU, mapped into memory if possible.

    Raises:
        ValueError: if the file is truncated or damaged, or not plain data.
    """
    with path.open("rb") as file:
        head = file.read(len(_LEGACY))
    is_zip = head.startswith(ZIP)
    if not is_zip and head != _LEGACY:
        raise ValueError(_refusal(path, "a plain pickle"))
    mmap = is_zip and path.suffix != ".safetensors"  # torch trusts this name, and maps by name only
    try:
        if is_zip and _is_torchscript(path):
            raise ValueError("a TorchScript archive (as OpenAI's CLIP files are), no checkpoint")
        with torch.serialization.safe_globals(_STAND_INS), path.open("rb") as file:
            return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of many types, by where the file breaks
        reason = str(error).partition("\n")[0]
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise ValueError(_refusal(path, f"it names {forbidden[1]}")) from error
        raise ValueError(f"{path} is truncated, damaged or of another kind: {reason}") from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _refusal(path: Path, why: str) -> str:
    return (
        f"{path} is refused: reading it could execute code ({why}). If you trust its origin, open it where "
        "it can do no harm with torch.load(file, weights_only=False) or pickle.load, and write its tensors "
        "with safetensors.torch.save_file"
    )
