"""Stand-ins for the functions and classes that files of `torch.save` name: tensors, numpy arrays, and others.

The arguments of every function here come from a file. Only exact types are accepted (`type(x) is …`), so that
an object of the file cannot pass for another one. Numbers are checked before torch or numpy uses them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from catseg_fast.checkpoints.unpickle import Global, Opaque, Restored

_INTEGERS = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name) for name in ("bool", *_INTEGERS, *_FLOATS)
}
STORAGES: dict[str, torch.dtype] = {
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.storage.UntypedStorage": torch.uint8,
}
MOST_DIMENSIONS = 64  # torch's own limit, and numpy's
_LARGEST_EMPTY = 2**40  # elements that an empty tensor has but for its sizes of 0


class Storage(NamedTuple):
    """A storage of the file: uint8 values, and the type that the file gives them."""

    values: Tensor
    dtype: torch.dtype


class NumpyDtype(Restored):
    """A stand-in for `numpy.dtype`, for numbers and booleans only."""

    def __init__(self, code: str) -> None:
        self._code, self._dtype = code, None

    @property
    def dtype(self) -> np.dtype:
        if self._dtype is None:
            raise ValueError("a numpy type without its state")
        return self._dtype

    def restore(self, state: Any) -> None:
        """Set the byte order; other state of a numeric type does not matter."""
        _require(self._dtype is None, "a numpy type, which has two states")
        _require(type(state) is tuple and len(state) in (8, 9), "the state of a numpy type")
        order, absent = state[1], (*state[2:5], *state[8:])  # subarray, names, fields, metadata
        _require(type(order) is str and order in ("<", ">", "=", "|"), "the byte order of a numpy type")
        _require(all(x is None for x in absent), "a numpy type, which has fields")
        self._dtype = np.dtype(order + self._code)


class NumpyArray(Restored):
    """A stand-in for `numpy.ndarray`, with the values in `tensor`."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            raise ValueError("a numpy array without its state")
        return self._tensor

    def restore(self, state: Any) -> None:
        """Set shape, type and values."""
        _require(self._tensor is None, "a numpy array, which has two states")
        _require(type(state) is tuple and len(state) == 5, "the state of a numpy array")
        version, shape, dtype, fortran, data = state
        _require(type(version) is int and version == 1, "the version of a numpy array's state")
        _require(_are_sizes(shape), "the shape of a numpy array")
        _require(type(dtype) is NumpyDtype, "the type of a numpy array")
        _require(type(fortran) is bool, "the order of a numpy array")
        _require(type(data) is bytes, "the values of a numpy array")
        expected = math.prod(shape) * dtype.dtype.itemsize
        if len(data) != expected:
            raise ValueError(f"a numpy array of {expected} bytes has {len(data)}")
        values = np.frombuffer(data, dtype.dtype) if data else np.empty(0, dtype.dtype)
        array = values.reshape(shape, order="F" if fortran else "C")
        self._tensor = torch.from_numpy(array.astype(dtype.dtype.newbyteorder("="), order="C"))


def _numpy_dtype(*arguments: Any) -> NumpyDtype:
    _require(len(arguments) in (1, 2, 3) and type(arguments[0]) is str, "the arguments of numpy.dtype")
    _require(all(type(flag) in (bool, int) for flag in arguments[1:]), "the arguments of numpy.dtype")
    code = arguments[0]
    if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
        raise ValueError(f"numpy arrays of type {ascii(code[:20])[1:-1]} are not supported")
    return NumpyDtype(code)


def _numpy_array(*arguments: Any) -> NumpyArray:
    _require(len(arguments) == 3 and type(arguments[0]) is Global, "the arguments of numpy's _reconstruct")
    _require(arguments[0].name == "numpy.ndarray", "the arguments of numpy's _reconstruct")
    return NumpyArray()


def _numpy_scalar(*arguments: Any) -> bool | int | float:
    _require(len(arguments) == 2 and type(arguments[0]) is NumpyDtype, "the arguments of numpy's scalar")
    dtype, data = arguments[0].dtype, arguments[1]
    _require(type(data) is bytes and len(data) == dtype.itemsize, "the value of a numpy scalar")
    value: bool | int | float = np.frombuffer(data, dtype)[0].item()
    return value


def _encode(*arguments: Any) -> bytes:
    """Return bytes, which protocol 2 writes as the text with these code points."""
    _require(len(arguments) == 2 and all(type(x) is str for x in arguments), "the arguments of encode")
    _require(arguments[1] in ("latin1", "latin-1"), "the encoding of bytes")
    text: str = arguments[0]
    return text.encode("latin-1")


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    _require(not arguments, "the arguments of OrderedDict")
    return {}


def _opaque(*_: Any) -> Opaque:
    return Opaque()


def _tensor(*arguments: Any) -> Tensor:
    """`torch._utils._rebuild_tensor`, and `…_v2`, which have the storage's type."""
    _require(len(arguments) in (4, 6, 7) and type(arguments[0]) is Storage, "the arguments of a tensor")
    storage, offset, size, stride, *rest = arguments
    _require_plain(rest[2:])
    return view(storage.values, storage.dtype, offset, size, stride)


def _typed_tensor(*arguments: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v3`, which has a type of its own."""
    _require(len(arguments) in (7, 8) and type(arguments[0]) is Storage, "the arguments of a tensor")
    storage, offset, size, stride, _, _, dtype, *rest = arguments
    _require(type(dtype) is Global and dtype.name in DTYPES, "the type of a tensor")
    _require_plain(rest)
    return view(storage.values, DTYPES[dtype.name], offset, size, stride)


def _parameter(*arguments: Any) -> Tensor:
    """`torch._utils._rebuild_parameter`, and `…_with_state`."""
    _require(len(arguments) in (3, 4) and type(arguments[0]) is Tensor, "the arguments of a parameter")
    tensor: Tensor = arguments[0]
    return tensor


def _tensor_with_attributes(*arguments: Any) -> Tensor:
    """`torch._tensor._rebuild_from_type_v2`: a call of another of these functions, without attributes."""
    _require(len(arguments) == 4, "the arguments of a tensor with attributes")
    function, kind, inner, _ = arguments
    _require(type(function) is Global and function.name in _TENSORS, "the function of a tensor")
    _require(type(kind) is Global and kind.name in _TENSOR_TYPES, "the class of a tensor")
    _require(type(inner) is tuple, "the arguments of a tensor with attributes")
    return _TENSORS[function.name](*inner)


def view(values: Tensor, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
    """Return a tensor of some type as a view of uint8 values, with no more elements than they hold.

    Raises:
        ValueError: if it would not be inside of the values; `offset`, `size` and `stride` may be anything.
    """
    _require(type(offset) is int and offset >= 0, "the offset of a tensor")
    _require(_are_sizes(size) and _are_sizes(stride) and len(size) == len(stride), "the size of a tensor")
    if 0 in size:
        _require(math.prod(max(length, 1) for length in size) <= _LARGEST_EMPTY, "the size of a tensor")
        return torch.empty(size, dtype=dtype)
    available = values.numel() // dtype.itemsize
    end = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    needed = max(end, math.prod(size))
    if needed > available:
        raise ValueError(f"a tensor needs {needed} elements of a storage of {available}")
    return torch.empty(0, dtype=dtype).set_(values.untyped_storage(), offset, size, stride)


def _are_sizes(sizes: Any) -> bool:
    """Check whether these are sizes or strides of a tensor."""
    return (
        type(sizes) is tuple
        and len(sizes) <= MOST_DIMENSIONS
        and all(type(length) is int and 0 <= length < 2**63 for length in sizes)
    )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the pickle has a fault in {what}")


def _require_plain(metadata: list[Any]) -> None:
    """Refuse the marks of a conjugated or negated tensor, whose values differ from its storage's."""
    plain = all(x is None or (type(x) is dict and not x) for x in metadata)
    _require(plain, "the metadata of a tensor")


_TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_TENSOR_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")

# Objects that training states hold besides the weights.
_UNUSED = (
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.set",
    "collections.Counter",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "torch.Size",
    "torch.device",
)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray._reconstruct": _numpy_array,  # numpy 1
    "numpy._core.multiarray._reconstruct": _numpy_array,  # numpy 2
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **dict.fromkeys(_UNUSED, _opaque),
}
NAMES = frozenset((*DTYPES, *STORAGES, *_TENSOR_TYPES, "numpy.ndarray"))
