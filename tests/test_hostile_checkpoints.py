"""Checkpoint files that are made to do harm: each is refused, soon, with a message that can be printed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from catseg_fast.checkpoints.checkpoint import MAX_HEADER, convert, read_checkpoint
from catseg_fast.checkpoints.layouts import MAX_TENSORS
from catseg_fast.checkpoints.stand_ins import FUNCTIONS
from support import hostile_files as hostile
from support.hostile_files import call, name, number, octets, row, text

SECONDS = 5  # of CPU time that a refusal may take


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def refused(path: Path, data: bytes, reason: str) -> None:
    """Check that a file is refused for this reason, without delay."""
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(ValueError, match=reason) as caught:
        read_checkpoint(path)
    assert time.process_time() - start < SECONDS
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert "weights_only" not in message


def model(*values: bytes, keys: list[str] | None = None) -> bytes:
    """An archive whose state dict holds these values."""
    pairs = b"".join(text(key) + value for key, value in zip(keys or "abcdefgh", values, strict=False))
    return hostile.archive(b"\x80\x02}" + hostile.MARK + pairs + b"u.")


def tensor(storage: bytes, offset: bytes, *sizes: bytes) -> bytes:
    rest = hostile.FALSE, hostile.NEW_DICT
    return call("torch._utils._rebuild_tensor_v2", storage, offset, *sizes, *rest)


def entries(*rows: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for entry, data in rows:
            archive.writestr(entry, data)
    return file.getvalue()


PICKLE = ("w/data.pkl", hostile.in_model(hostile.TENSOR))
STORED = ("w/data/0", hostile.RAW)


# ---- fuzz -------------------------------------------------------------------------------------------------


PARTS = 8  # of all files; a part takes a minute or two


def fuzz(folder: Path, share: float, seed: int, part: int = 0, parts: int = 1) -> None:
    """Read hostile files in other processes, which must neither crash nor raise anything but a refusal."""
    pytest.importorskip("resource")
    arguments = map(str, (folder, share, seed, part, parts))
    command = [sys.executable, "-W", "ignore", "-m", "support.fuzz_checkpoints", *arguments]
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    print(report)
    assert report["faults"] == []
    assert report["refused"] + report["read"] + report["equal"] == report["cases"] > 1000
    assert report["refused"] > report["cases"] / 2
    assert report["equal"] > 0
    assert report["longest"][0] < SECONDS


def test_a_share_of_all_hostile_files(tmp_path: Path) -> None:
    fuzz(tmp_path, 0.004, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_all_hostile_files(part: int, tmp_path: Path) -> None:
    fuzz(tmp_path, 1, 1, part, PARTS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_fuzz_starts_from_calls_that_are_answered(function: str, path: Path) -> None:
    value = call(function, *hostile.ARGUMENTS.get(function, ()))
    path.write_bytes(model(hostile.TENSOR, keys=["kept"]))
    assert read_checkpoint(path)["kept"].shape == (4, 4)
    content = b"\x80\x02}" + hostile.MARK + text("model") + b"}" + text("used") + value + b"u."
    path.write_bytes(hostile.archive(content))
    assert read_checkpoint(path) == {}


# ---- objects that look like others ------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["O", "V8", "i4,O", "f4", "M8[ns]"])
def test_an_object_with_a_dtype_is_no_dtype(code: str, path: Path) -> None:
    liar = hostile.NEW_DICT + b"}" + text("dtype") + text(code) + b"s" + hostile.BUILD
    for size in (4, 8, 16, 32, 64):
        data = octets(bytes([65]) * size)
        refused(path, model(call("numpy.core.multiarray.scalar", liar, data)), "arguments of numpy's scalar")
        state = row(number(1), row(number(size // 8)), liar, hostile.FALSE, data)
        refused(path, model(hostile.NEW_ARRAY + state + hostile.BUILD), "the type of a numpy array")


@pytest.mark.parametrize(
    "code", ["O", "O8", "V8", "S4", "U4", "M8", "m8", "c8", "f16", "f4,f4", "(2,)f4", "f\x1b4"]
)
def test_other_dtypes_are_refused(code: str, path: Path) -> None:
    refused(path, model(hostile.dtype(code)), "numpy arrays of type .* are not supported")


@pytest.mark.parametrize("order", ["", "<<", "O", "<f4,", "s", "!"])
def test_other_byte_orders_are_refused(order: str, path: Path) -> None:
    refused(path, model(hostile.dtype("f4", order)), "the byte order of a numpy type")


def array_of(data: bytes, *shape: int) -> bytes:
    state = row(number(1), row(*map(number, shape)), hostile.dtype(), hostile.FALSE, octets(data))
    return hostile.NEW_ARRAY + state + hostile.BUILD


STATES: dict[str, tuple[bytes, str]] = {
    "no array": (hostile.NEW_ARRAY, "a numpy array without its state"),
    "no dtype": (
        call("numpy.core.multiarray.scalar", hostile.new_dtype(), octets(bytes(4))),
        "a numpy type without its state",
    ),
    "two arrays": (hostile.ARRAY + row(*hostile.ARRAY_STATE) + hostile.BUILD, "which has two states"),
    "two dtypes": (hostile.dtype() + row(*hostile.DTYPE_STATE) + hostile.BUILD, "which has two states"),
    "fields": (
        hostile.new_dtype()
        + row(*hostile.DTYPE_STATE[:3], row(text("a")), *hostile.DTYPE_STATE[4:])
        + hostile.BUILD,
        "which has fields",
    ),
    "short": (array_of(bytes(12), 2, 2), "numpy array of 16 bytes has 12"),
    "long": (array_of(bytes(20), 2, 2), "numpy array of 16 bytes has 20"),
    "overflow": (array_of(bytes(16), 2**62 + 1, 4), "has 16"),
    "negative": (array_of(bytes(16), -1, -4), "the shape of a numpy array"),
    "a state for a tensor": (hostile.TENSOR + b"}" + hostile.BUILD, "restores the state of a Tensor"),
    "a state for a function": (name("numpy.dtype") + b"}" + hostile.BUILD, "restores the state of a Global"),
    "a function as a value": (name("numpy.dtype"), "'a' is a Global"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_states_are_required_once_and_exact(case: str, path: Path) -> None:
    piece, reason = STATES[case]
    refused(path, model(piece), reason)


# ---- tensors ----------------------------------------------------------------------------------------------

# Of a storage of 16 values: offset, size, stride.
OUTSIDE: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "too long": (0, (17,), (1,)),
    "offset": (13, (4,), (1,)),
    "offset far": (2**62, (1,), (1,)),
    "negative offset": (-1, (1,), (1,)),
    "negative size": (0, (-1,), (1,)),
    "negative stride": (15, (2,), (-1,)),
    "stride": (0, (2, 2), (15, 1)),
    "sizes that overflow": (0, (2**32, 2**32), (1, 1)),
    "strides that overflow": (0, (3,), (2**63 - 1,)),
    "more elements than values": (0, (2**40,), (0,)),
    "an empty giant": (0, (0, 2**62), (1, 1)),
    "too few strides": (0, (2, 2), (1,)),
    "too many sizes": (0, (1,) * 65, (1,) * 65),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_tensor_lies_inside_of_its_storage(case: str, path: Path) -> None:
    offset, size, stride = OUTSIDE[case]
    piece = tensor(hostile.storage(), number(offset), row(*map(number, size)), row(*map(number, stride)))
    refused(path, model(piece), "needs .* elements of a storage of 16|the (offset|size) of a tensor")


STORAGE_IDS: dict[str, tuple[int, bytes, str]] = {
    "longer": (0, number(17), "storage 0 has 64 bytes, but should have 17 elements of 4"),
    "shorter": (0, number(15), "storage 0 has 64 bytes, but should have 15 elements of 4"),
    "of another type": (1, name("torch.DoubleStorage"), "should have 16 elements of 8"),
    "not there": (2, text("9"), "there is no storage 9"),
    "elsewhere": (2, text("../w/data/0"), "there is no storage"),
    "a number": (2, number(0), "the persistent id of a storage"),
    "no storage": (0, text("module"), "the persistent id of a storage"),
    "no type": (1, name("torch.float32"), "the persistent id of a storage"),
    "negative": (4, number(-16), "the persistent id of a storage"),
}


@pytest.mark.parametrize("case", STORAGE_IDS)
def test_a_storage_is_as_long_as_it_says(case: str, path: Path) -> None:
    place, value, reason = STORAGE_IDS[case]
    identity = list(hostile.STORAGE_ID)
    identity[4 if case in ("longer", "shorter") else place] = value
    piece = tensor(hostile.storage(*identity), number(0), row(number(1)), row(number(1)))
    refused(path, model(piece), reason)


@pytest.mark.parametrize("write", [hostile.archive, hostile.legacy])
def test_a_storage_has_one_type(write: Callable[[bytes], bytes], path: Path) -> None:
    """torch would read both tensors in the type of the first."""
    legacy = (hostile.NONE,) if write is hostile.legacy else ()
    identities = [
        (hostile.STORAGE_ID[0], name(kind), *hostile.STORAGE_ID[2:], *legacy)
        for kind in ("torch.FloatStorage", "torch.IntStorage")
    ]
    pieces = [tensor(hostile.storage(*x), number(0), row(number(1)), row(number(1))) for x in identities]
    refused(path, write(hostile.in_model(row(*pieces))), "storage 0 has two types")


def test_a_legacy_file_gets_no_memory_that_it_does_not_fill(path: Path) -> None:
    for elements in (2**40, 17, 15):
        identity = (*hostile.STORAGE_ID[:4], number(elements), hostile.NONE)
        piece = tensor(hostile.storage(*identity), number(0), row(number(1)), row(number(1)))
        refused(
            path, hostile.legacy(hostile.in_model(piece)), "more than the .* bytes of the file|storage 0 is"
        )


def test_many_tensors_on_one_storage(path: Path) -> None:
    for count in (1, 3, 2000):
        pairs = b"".join(text(f"k{index}") + b"h\x00" for index in range(count))
        first = text("first") + hostile.TENSOR + b"q\x00s"
        data = hostile.archive(b"\x80\x02}" + first + hostile.MARK + pairs + b"u.")
        if count < 2000:  # as tied weights are
            path.write_bytes(data)
            assert len(read_checkpoint(path)) == count + 1
        else:
            refused(path, data, f"its tensors have {64 * (count + 1)} bytes, the file {len(data)}")


def test_metadata_that_changes_values_is_refused(path: Path) -> None:
    marks = b"}" + text("neg") + hostile.TRUE + b"s"
    arguments = (*hostile.TENSOR_ARGUMENTS, marks)
    refused(path, model(call("torch._utils._rebuild_tensor_v2", *arguments)), "the metadata of a tensor")


def test_booleans_are_0_or_1(path: Path) -> None:
    identity = (hostile.STORAGE_ID[0], name("torch.BoolStorage"), *hostile.STORAGE_ID[2:4], number(64))
    path.write_bytes(model(tensor(hostile.storage(*identity), number(0), row(number(64)), row(number(1)))))
    found = read_checkpoint(path)["a"]
    assert found.dtype == torch.bool
    assert found.view(torch.uint8).tolist() == [0] + [1] * 63


def test_a_storage_at_an_odd_place_is_read(path: Path) -> None:
    expected = torch.frombuffer(bytearray(hostile.RAW), dtype=torch.float32).view(4, 4)
    for padding in range(9):
        path.write_bytes(entries(PICKLE, ("w/padding", bytes(padding)), STORED))
        found = read_checkpoint(path)["x"]
        assert found.data_ptr() % 4 == 0
        assert torch.equal(found, expected)


# ---- limits -----------------------------------------------------------------------------------------------


def empty_safetensors(count: int) -> bytes:
    header = {
        f"layer.{index}.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for index in range(count)
    }
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded


def many_entries(count: int) -> bytes:
    """An archive whose table of contents names so many entries, without the entries."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    size = count * len(entry)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, 4)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4 + size, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return b"PK\x03\x04" + entry * count + end64 + locator + end


def pickle_of(items: bytes) -> bytes:
    return hostile.archive(b"\x80\x02]" + hostile.MARK + items + b"e.")


EQUAL_HASHES = range(sys.hash_info.modulus, 10**5 * sys.hash_info.modulus, sys.hash_info.modulus)
LONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "10^7 items": (lambda: pickle_of(b"N" * 10**7), "more than 2000000 opcodes"),
    "10^7 items in the older format": (
        lambda: hostile.legacy(b"\x80\x02(" + b"N" * 10**7 + b"t."), "more than 2000000 opcodes"
    ),
    "10^5 keys": (
        lambda: hostile.archive(b"\x80\x02}(" + b"".join(text(f"k{i}") + b"N" for i in range(10**5)) + b"u."),
        f"holds 100000 entries; a checkpoint has at most {MAX_TENSORS}",
    ),
    "safetensors, 10^5 keys": (
        lambda: empty_safetensors(10**5), f"holds 100000 entries; a checkpoint has at most {MAX_TENSORS}"
    ),
    "safetensors, long header": (
        lambda: struct.pack("<Q", 2**60) + b"{}", f"header has {2**60} bytes; at most {MAX_HEADER} are read"
    ),
    "safetensors, cut": (lambda: struct.pack("<Q", 10**6) + b"{}", "damaged safetensors"),
    "safetensors, deep": (lambda: struct.pack("<Q", 10**6) + b'{"a":' * 200_000, "damaged safetensors"),
    "safetensors, no object": (lambda: struct.pack("<Q", 5) + b"{1,2}", "damaged safetensors"),
    "10^6 entries": (lambda: many_entries(10**6), "a table of contents of 47000000 bytes"),
    "keys of equal hash": (
        lambda: hostile.archive(b"\x80\x02}(" + b"".join(number(key) + b"N" for key in EQUAL_HASHES) + b"u."),
        "dictionary key of type int",
    ),
    "a key of nested tuples": (
        lambda: hostile.archive(b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns."),
        "dictionary key of type tuple",
    ),
    "a text as long as it says": (lambda: hostile.archive(b"\x80\x02X\xff\xff\xff\xffabc."), "damaged"),
    "a far place in the memo": (lambda: hostile.archive(b"\x80\x02}r\xff\xff\xff\x7f"), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", LONG)
def test_long_files_are_refused_soon(case: str, path: Path) -> None:
    make, reason = LONG[case]
    refused(path, make(), reason)


def test_a_small_pickle_of_a_large_tree_is_harmless(path: Path) -> None:
    """Sixty tuples of the last one twice: 2^60 leaves if anything were to visit them."""
    tree = b")" + b"q\x00h\x00\x86" * 60
    content = b"\x80\x02}" + hostile.MARK + text("optimizer") + tree + text("model") + b"}u."
    path.write_bytes(hostile.archive(content))
    assert read_checkpoint(path) == {}


def test_names_in_messages_are_escaped_and_cut(path: Path) -> None:
    for key in ("\x1b[31mred", "a\nb", "\ud800", "k" * 10_000, "\u202eabc"):
        refused(path, model(hostile.TENSOR, keys=[key]), "is not a parameter's name")
        refused(path, model(hostile.NONE, keys=[key]), "is a NoneType")
    refused(path, model(b"cos\nsystem\x1b[31m\n"), r"could execute code \(it names")
    refused(path, model(name("os.system")), r"could execute code \(it names os\.system\)")
    refused(path, model(hostile.VALUES["storage"] + hostile.EMPTY + hostile.REDUCE), "it calls a value")


# ---- archives ---------------------------------------------------------------------------------------------


def patched(data: bytes, entry: str, place: int, value: bytes, central: bool = True) -> bytes:
    """An archive with bytes of an entry's header changed, in the table of contents or before the entry."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.getinfo(entry).header_offset
        if central:
            start = archive.start_dir
            while data[start + 46 : start + 46 + len(entry)] != entry.encode():
                start += 46 + sum(struct.unpack_from("<3H", data, start + 28))
    return data[: start + place] + value + data[start + place + len(value) :]


def archives() -> Iterator[tuple[str, bytes, str]]:
    valid = entries(PICKLE, STORED)
    bomb = ("w/data/0", bytes(2**27))
    yield "bomb", entries(PICKLE, bomb, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"
    yield "compressed pickle", entries(PICKLE, compression=zipfile.ZIP_BZIP2), "compressed or encrypted"
    yield "encrypted", patched(valid, "w/data/0", 8, b"\x01"), "compressed or encrypted"
    yield "two pickles", entries(PICKLE, ("v/data.pkl", PICKLE[1]), STORED), "an archive with 2 data.pkl"
    yield "no pickle", entries(STORED), "an archive with 0 data.pkl"
    with pytest.warns(UserWarning, match="Duplicate name"):
        yield "twice", entries(PICKLE, STORED, STORED), "two entries w/data/0"
    yield "size", patched(valid, "w/data/0", 24, struct.pack("<L", 65)), "differs from its table of contents"
    beyond = patched(
        patched(valid, "w/data/0", 24, struct.pack("<L", 2**31)), "w/data/0", 20, struct.pack("<L", 2**31)
    )
    yield "beyond the end", beyond, "not inside of it"
    grown = patched(
        patched(valid, "w/data.pkl", 24, struct.pack("<L", 999)), "w/data.pkl", 20, struct.pack("<L", 999)
    )
    yield "overlap", grown, "not inside of it, or overlaps another"
    yield "offset", patched(valid, "w/data/0", 42, struct.pack("<L", 2**31)), "not inside of it"
    yield "same place", patched(valid, "w/data/0", 42, struct.pack("<L", 0)), "overlaps another"
    yield "another name", patched(valid, "w/data/0", 30, b"w/data/1", central=False), "differs from its table"
    yield "no header", patched(valid, "w/data/0", 0, b"XXXX", central=False), "differs from its table"
    yield "extra", patched(valid, "w/data/0", 28, b"\xff\xff", central=False), "not inside of it|differs from"
    yield "bytes behind the pickle", entries((PICKLE[0], PICKLE[1] + b"N."), STORED), "does not end where"
    yield "byte order", entries(PICKLE, ("w/byteorder", b"big"), STORED), "another byte order"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("data", "reason"), [(data, reason) for _, data, reason in archives()],
                         ids=[label for label, _, _ in archives()])  # fmt: skip
def test_archives_that_lie(data: bytes, reason: str, path: Path) -> None:
    refused(path, data, reason)


@pytest.mark.parametrize(
    "opcode", ["INST", "OBJ", "EXT1", "STACK_GLOBAL", "DUP", "POP", "LONG4", "INT", "STRING"]
)
def test_other_opcodes_are_refused(opcode: str, path: Path) -> None:
    code = getattr(pickle, opcode)
    argument = {"INST": b"os\nsystem\n", "INT": b"1\n", "STRING": b"'a'\n", "LONG4": b"\x01\x00\x00\x00\x01"}
    content = b"\x80\x02}" + text("a") + hostile.MARK + b"N" + code + argument.get(opcode, b"\x01") + b"s."
    refused(path, hostile.archive(content), f"opcode {opcode} is not supported")


def test_convert_refuses_too(path: Path, tmp_path: Path) -> None:
    path.write_bytes(model(name("os.system")))
    with pytest.raises(ValueError, match="could execute code"):
        convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_training_states_hold_beside_weights_is_skipped(path: Path) -> None:
    import argparse
    import collections

    weights = {"a": torch.arange(6.0).view(2, 3).t()}
    torch.save(
        {
            "model": weights, "args": argparse.Namespace(lr=1e-3), "counts": collections.Counter("aab"),
            "seen": {1, 2}, "device": torch.device("cpu"), "size": torch.Size([2]), "type": torch.float16,
            "bytes": b"\xff\x00", "array": bytearray(b"x"), "complex": 1j, "folder": Path("a"),
            None: 1, True: 2, "random": random.Random(0).getstate(),
            "numpy": np.random.RandomState(0).get_state(),
        },
        path,
    )  # fmt: skip
    assert torch.equal(read_checkpoint(path)["a"], weights["a"])
