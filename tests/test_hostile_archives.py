"""Zip archives whose headers lie, and pickles in them that no checkpoint has."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from catseg_fast.checkpoints.checkpoint import convert, read_checkpoint
from support import hostile_files as hostile
from support.hostile_files import name, text
from support.odd_checkpoints import PICKLE, STORED, entries, model
from support.refusals import assert_refused


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def patched(data: bytes, entry: str, place: int, value: bytes, central: bool = True) -> bytes:
    """Return an archive with bytes of an entry's header changed, in the table of contents or before it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.getinfo(entry).header_offset
        if central:
            start = archive.start_dir
            while data[start + 46 : start + 46 + len(entry)] != entry.encode():
                start += 46 + sum(struct.unpack_from("<3H", data, start + 28))
    return data[: start + place] + value + data[start + place + len(value) :]


def valid() -> bytes:
    return entries(PICKLE, STORED)


def with_fields(entry: str, *changes: tuple[int, int]) -> bytes:
    """Return an archive with 32-bit fields of an entry changed in the table of contents."""
    data = valid()
    for place, value in changes:
        data = patched(data, entry, place, struct.pack("<L", value))
    return data


def before(place: int, value: bytes) -> bytes:
    """Return an archive with bytes of the header before a storage changed."""
    return patched(valid(), "w/data/0", place, value, central=False)


SIZE, COMPRESSED_SIZE, OFFSET = 24, 20, 42  # places in an entry's header in the table of contents
CHANGED = "differs from its table"
ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "bomb": (
        lambda: entries(PICKLE, ("w/data/0", bytes(2**27)), compression=zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
    "compressed pickle": (
        lambda: entries(PICKLE, compression=zipfile.ZIP_BZIP2), "compressed or encrypted"
    ),
    "encrypted": (lambda: patched(valid(), "w/data/0", 8, b"\x01"), "compressed or encrypted"),
    "two pickles": (
        lambda: entries(PICKLE, ("v/data.pkl", PICKLE[1]), STORED), "an archive with 2 data.pkl"
    ),
    "no pickle": (lambda: entries(STORED), "an archive with 0 data.pkl"),
    "twice": (lambda: entries(PICKLE, STORED, STORED), "two entries w/data/0"),
    "size": (lambda: with_fields("w/data/0", (SIZE, 65)), "differs from its table of contents"),
    "beyond the end": (
        lambda: with_fields("w/data/0", (SIZE, 2**31), (COMPRESSED_SIZE, 2**31)), "not inside of it"
    ),
    "overlap": (
        lambda: with_fields("w/data.pkl", (SIZE, 999), (COMPRESSED_SIZE, 999)),
        "not inside of it, or overlaps another",
    ),
    "offset": (lambda: with_fields("w/data/0", (OFFSET, 2**31)), "not inside of it"),
    "same place": (lambda: with_fields("w/data/0", (OFFSET, 0)), "overlaps another"),
    "another name": (lambda: before(30, b"w/data/1"), CHANGED),
    "no header": (lambda: before(0, b"XXXX"), CHANGED),
    "extra": (lambda: before(28, b"\xff\xff"), "not inside of it|differs from"),
    "bytes behind the pickle": (
        lambda: entries((PICKLE[0], PICKLE[1] + b"N."), STORED), "does not end where"
    ),
    "byte order": (lambda: entries(PICKLE, ("w/byteorder", b"big"), STORED), "another byte order"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_lie(case: str, path: Path) -> None:
    make, reason = ARCHIVES[case]
    assert_refused(path, make(), reason)


@pytest.mark.parametrize(
    "opcode", ["INST", "OBJ", "EXT1", "STACK_GLOBAL", "DUP", "POP", "LONG4", "INT", "STRING"]
)
def test_other_opcodes_are_refused(opcode: str, path: Path) -> None:
    code = getattr(pickle, opcode)
    argument = {"INST": b"os\nsystem\n", "INT": b"1\n", "STRING": b"'a'\n", "LONG4": b"\x01\x00\x00\x00\x01"}
    content = b"\x80\x02}" + text("a") + hostile.MARK + b"N" + code + argument.get(opcode, b"\x01") + b"s."
    assert_refused(path, hostile.archive(content), f"opcode {opcode} is not supported")


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
