"""Checkpoint files as an attacker would write them: every name that the reader knows, in every place.

Values are pieces of a pickle that push one value each, so that any of them can stand anywhere.
"""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from catseg_fast.checkpoints.hub import BUNDLED
from catseg_fast.checkpoints.stand_ins import FUNCTIONS, NAMES

Case = tuple[str, bytes]  # what it is, and the file

MARK, TUPLE, REDUCE, BUILD, PERSISTENT, STOP = b"(", b"t", b"R", b"b", b"Q", b"."
RAW = bytes(range(64))


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def name(value: str) -> bytes:
    module, _, last = value.rpartition(".")
    return b"c" + module.encode() + b"\n" + last.encode() + b"\n"


def row(*values: bytes) -> bytes:
    return MARK + b"".join(values) + TUPLE


def call(function: str, *values: bytes) -> bytes:
    return name(function) + row(*values) + REDUCE


def octets(value: bytes) -> bytes:
    return call("_codecs.encode", text(value.decode("latin-1")), text("latin1"))


NONE, TRUE, FALSE, EMPTY = b"N", b"\x88", b"\x89", row()
NEW_DICT = call("collections.OrderedDict")
NEW_ARRAY = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), row(number(0)), octets(b"b"))
DTYPE_STATE = (number(3), text("<"), NONE, NONE, NONE, number(-1), number(-1), number(0))
STORAGE_ID = (text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), number(16))
LEGACY_ID = (*STORAGE_ID, NONE)


def new_dtype(code: str = "f4") -> bytes:
    return call("numpy.dtype", text(code), FALSE, TRUE)


def dtype(code: str = "f4", order: str = "<") -> bytes:
    return new_dtype(code) + row(DTYPE_STATE[0], text(order), *DTYPE_STATE[2:]) + BUILD


ARRAY_STATE = (number(1), row(number(2), number(2)), dtype(), FALSE, octets(RAW[:16]))
ARRAY = NEW_ARRAY + row(*ARRAY_STATE) + BUILD


def storage(*identity: bytes) -> bytes:
    return row(*(identity or STORAGE_ID)) + PERSISTENT


def tensor_arguments(identity: tuple[bytes, ...] = STORAGE_ID) -> tuple[bytes, ...]:
    sizes = row(number(4), number(4)), row(number(4), number(1))
    return storage(*identity), number(0), *sizes, FALSE, NEW_DICT


TENSOR_ARGUMENTS = tensor_arguments()
TENSOR = call("torch._utils._rebuild_tensor_v2", *TENSOR_ARGUMENTS)
LIAR = NEW_DICT + b"}" + b"".join(
    MARK + text(key) + value + b"u"
    for key, value in {
        "dtype": text("O"), "itemsize": number(8), "name": text("numpy.ndarray"), "values": TENSOR,
        "tensor": TENSOR, "_untyped_storage": TENSOR, "__class__": name("numpy.dtype"),
        "restore": name("numpy.dtype"),
    }.items()
) + BUILD  # fmt: skip

# Arguments with which each function answers, as a start.
ARGUMENTS: dict[str, tuple[bytes, ...]] = {
    "torch._utils._rebuild_tensor": TENSOR_ARGUMENTS[:4],
    "torch._utils._rebuild_tensor_v2": (*TENSOR_ARGUMENTS, b"}"),
    "torch._utils._rebuild_tensor_v3": (*TENSOR_ARGUMENTS, name("torch.float32")),
    "torch._utils._rebuild_parameter": (TENSOR, TRUE, NEW_DICT),
    "torch._utils._rebuild_parameter_with_state": (TENSOR, TRUE, NEW_DICT, b"}"),
    "torch._tensor._rebuild_from_type_v2": (
        name("torch._utils._rebuild_tensor_v2"), name("torch._tensor.Tensor"), row(*TENSOR_ARGUMENTS), b"}",
    ),
    "collections.OrderedDict": (),
    "_codecs.encode": (text("abc"), text("latin1")),
    "numpy.dtype": (text("f4"), FALSE, TRUE),
}  # fmt: skip
for _numpy in ("numpy.core", "numpy._core"):
    ARGUMENTS[f"{_numpy}.multiarray._reconstruct"] = (name("numpy.ndarray"), row(number(0)), octets(b"b"))
    ARGUMENTS[f"{_numpy}.multiarray.scalar"] = (dtype(), octets(RAW[:4]))

SIZES = ((0,), (1,), (-1,), (0, 0), (2, 2), (2**40, 2**40), (0, 2**62), (2**62, 4))
TEXTS = (
    "", "x", "0", "1", "9", "f4", "O", "O8", "V8", "b1", "<", ">", "|", "latin1", "zlib_codec", "storage",
    "cpu", "cuda", "numpy.ndarray", "\ud800", "\x1b[31m", "a" * 5000,
)  # fmt: skip
VALUES: dict[str, bytes] = {
    **{f"{value}": number(value) for value in (0, 1, -1, 2, 3, 16, 17, 64, 255, -(2**31), 2**31, 2**40)},
    **{f"2^{power}": number(2**power) for power in (61, 62, 63, 64, 2000)},
    "-2^63": number(-(2**63)),
    **{str(value): b"G" + struct.pack(">d", value) for value in (1.5, float("nan"), float("inf"))},
    "None": NONE, "True": TRUE, "False": FALSE, "()": EMPTY, "[]": b"]", "{}": b"}", "set()": b"\x8f",
    **{repr(value): text(value) for value in TEXTS},
    **{f"{len(value)} bytes": octets(value) for value in (b"", RAW[:1], RAW[:4], RAW[:8], RAW[:16], RAW)},
    **{str(sizes): row(*map(number, sizes)) for sizes in SIZES}, "(4, True)": row(number(4), TRUE),
    "(1.0,)": row(b"G" + struct.pack(">d", 1.0)), "(None,)": row(NONE), "100 sizes": row(*[number(1)] * 100),
    "((1,),)": row(row(number(1))), "[1]": b"]" + number(1) + b"a",
    "8 objects": row(*[NONE] * 8), "{'dtype': 'O'}": b"}" + text("dtype") + text("O") + b"s", "liar": LIAR,
    "dict": NEW_DICT, "storage": storage(), "tensor": TENSOR, "empty array": NEW_ARRAY, "array": ARRAY,
    "raw dtype": new_dtype(), "dtype": dtype(), "bool dtype": dtype("b1", "|"), "big dtype": dtype("u8", ">"),
    "opaque": call("collections.Counter"),
    **{f"<{value}>": name(value) for value in sorted((*FUNCTIONS, *NAMES))},
}  # fmt: skip


def places(values: tuple[bytes, ...]) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """`values` with each other value in each place, beside the liar too, and with one value less or more."""
    yield "as it should be", values
    for place in range(len(values)):
        yield f"without {place}", values[:place] + values[place + 1 :]
        for label, value in VALUES.items():
            changed = (*values[:place], value, *values[place + 1 :])
            yield f"{label} at {place}", changed
            for other in range(len(values)):
                if other != place:
                    both = (*changed[:other], LIAR, *changed[other + 1 :])
                    yield f"{label} at {place}, liar at {other}", both
    for label, value in VALUES.items():
        yield f"{label} behind", (*values, value)


def pieces() -> Iterator[tuple[str, bytes]]:
    """Every value, call, state and storage id that can be made of the names and values."""
    yield from VALUES.items()
    for function in FUNCTIONS:
        for label, arguments in places(ARGUMENTS.get(function, ())):
            yield f"{function}, {label}", call(function, *arguments)
        for label, value in VALUES.items():
            yield f"{function}, of {label}", name(function) + value + REDUCE
    for label, identity in places(STORAGE_ID):
        sizes = TENSOR_ARGUMENTS[1:]
        yield f"id, {label}", call("torch._utils._rebuild_tensor_v2", storage(*identity), *sizes)
    for made, label, state in (
        *((new_dtype(), f"dtype, {label}", row(*state)) for label, state in places(DTYPE_STATE)),
        *((NEW_ARRAY, f"array, {label}", row(*state)) for label, state in places(ARRAY_STATE)),
    ):
        yield f"state of {label}", made + state + BUILD
        yield (
            f"state of {label}, used",
            call("numpy._core.multiarray.scalar", made + state + BUILD, octets(RAW[:4])),
        )
        yield f"second state of {label}", made + (state + BUILD) * 2
    for target, made in VALUES.items():
        for label, value in VALUES.items():
            yield f"state {label} of {target}", made + value + BUILD
            yield f"{target}[{label}]", made + value + NONE + b"s"
            yield f"{target}.append({label})", made + value + b"a"


def in_model(piece: bytes) -> bytes:
    """A pickle of `{"model": {"x": piece}}`."""
    return b"\x80\x02}" + text("model") + b"}" + text("x") + piece + b"ss" + STOP


def archive(content: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A zip archive as torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        entries.writestr("w/data.pkl", content)
        entries.writestr("w/version", "3\n")
        entries.writestr("w/byteorder", "little")
        for key, data in ({"0": RAW, "1": b""} if storages is None else storages).items():
            entries.writestr(f"w/data/{key}", data)
    return file.getvalue()


def legacy(content: bytes) -> bytes:
    """A file as torch.save wrote it before the zip format."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    pickles = [pickle.dumps(value, protocol=2) for value in head]
    keys = pickle.dumps(["0"], protocol=2)
    return b"".join((*pickles, content, keys, struct.pack("<Q", len(RAW) // 4), RAW))


def pickled_cases(rng: random.Random, share: float) -> Iterator[Case]:
    """Archives, and some files of the older format, of a share of all pieces."""
    for label, piece in pieces():
        if rng.random() < share:
            yield label, archive(in_model(piece))
    for label, identity in places(LEGACY_ID):
        if rng.random() < share:
            piece = call("torch._utils._rebuild_tensor_v2", *tensor_arguments(identity))
            yield f"older format, id, {label}", legacy(in_model(piece))


def program_cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Random programs of opcodes and values."""
    opcodes = [bytes([code]) for code in b"(tR bQ.0aesuN\x85\x86\x87\x81}])2" if code != 0x20]
    opcodes += [b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f"]
    values = list(VALUES.values())
    for index in range(count):
        parts = [rng.choice(values if rng.random() < 0.5 else opcodes) for _ in range(rng.randrange(1, 30))]
        yield f"program {index}", archive(in_model(b"".join(parts)))


def valid_files(folder: Path) -> dict[str, bytes]:
    """Small files of every format that is read."""
    content = {
        "a": torch.arange(12.0).view(3, 4),
        "b": torch.tensor([True, False]),
        "c": torch.ones(3).half(),
    }
    arrays = {"a": np.arange(6.0), "b": np.arange(4, dtype=">i2"), "step": np.float64(1)}
    with safe_open(BUNDLED["demo"], "pt") as file:
        weights = {key: torch.full((2, 3), float(index)) for index, key in enumerate(file.keys())}
    upstream = {
        "model": weights,
        "optimizer": {
            "state": {index: {"step": 3.0, "exp_avg": torch.zeros(2)} for index in range(20)},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": list(range(20))}],
        },
        "scheduler": {"last_epoch": 79_999, "base_lrs": [1e-4], "_last_lr": [0.0]},
        "iteration": 79_999,
    }
    writers: dict[str, Callable[[Path], None]] = {
        "upstream": lambda path: torch.save(upstream, path),
        "upstream, older": lambda path: torch.save(upstream, path, _use_new_zipfile_serialization=False),
        "zip": lambda path: torch.save({"model": content, "step": 3}, path),
        "older": lambda path: torch.save({"model": content}, path, _use_new_zipfile_serialization=False),
        "numpy": lambda path: torch.save(arrays, path),
    }
    files = {"safetensors": save(content), "upstream, safetensors": save(weights)}
    for label, write in writers.items():
        path = folder / f"valid-{label}.pth"
        write(path)
        files[label] = path.read_bytes()
    return files


def damaged_cases(files: dict[str, bytes], rng: random.Random, count: int) -> Iterator[Case]:
    """Bytes changed, cut, repeated and overwritten by telling values, `count` times for each file."""
    telling = [
        b"\x00",
        b"\xff",
        b"\xff\xff",
        *(struct.pack("<I", x) for x in (0, 1, 2**16, 2**31 - 1, 2**32 - 1)),
    ]
    telling += [struct.pack("<Q", x) for x in (2**40, 2**63 - 1, 2**64 - 1)]
    for label, valid in files.items():
        for index in range(count):
            data = bytearray(valid)
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                place = rng.randrange(len(data))
                kind = rng.randrange(5)
                if kind == 0:
                    data[place] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    value = rng.choice(telling)
                    data[place : place + len(value)] = value
                elif kind == 2:
                    del data[place : place + rng.randrange(1, 40)]
                elif kind == 3:
                    data[place:place] = data[place : place + rng.randrange(1, 200)]
                else:
                    data[place] = rng.randrange(256)
                if not data:
                    break
            yield f"damaged {label} {index}", bytes(data)
        for length in range(0, len(valid), max(1, len(valid) // 100)):
            yield f"{label} cut to {length}", valid[:length]
