"""Checkpoint files that are long, deep or full of names: each is refused within seconds."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from catseg_fast.checkpoints.checkpoint import MAX_HEADER, read_checkpoint
from catseg_fast.checkpoints.layouts import MAX_TENSORS
from support import hostile_files as hostile
from support.hostile_files import name, number, text
from support.odd_checkpoints import model
from support.refusals import assert_refused


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def empty_safetensors(count: int) -> bytes:
    header = {
        f"layer.{index}.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for index in range(count)
    }
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded


def many_entries(count: int) -> bytes:
    """Return an archive whose table of contents names some entries, without the entries."""
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
    assert_refused(path, make(), reason)


def test_a_small_pickle_of_a_large_tree_is_harmless(path: Path) -> None:
    """Each of sixty tuples holds the one before it twice: a tree of 2^60 leaves."""
    tree = b")" + b"q\x00h\x00\x86" * 60
    content = b"\x80\x02}" + hostile.MARK + text("optimizer") + tree + text("model") + b"}u."
    path.write_bytes(hostile.archive(content))
    assert read_checkpoint(path) == {}


def test_names_in_messages_are_escaped_and_cut(path: Path) -> None:
    for key in ("\x1b[31mred", "a\nb", "\ud800", "k" * 10_000, "\u202eabc"):
        assert_refused(path, model(hostile.TENSOR, keys=[key]), "is not a parameter's name")
        assert_refused(path, model(hostile.NONE, keys=[key]), "is a NoneType")
    assert_refused(path, model(b"cos\nsystem\x1b[31m\n"), r"could execute code \(it names")
    assert_refused(path, model(name("os.system")), r"could execute code \(it names os\.system\)")
    assert_refused(
        path, model(hostile.VALUES["storage"] + hostile.EMPTY + hostile.REDUCE), "it calls a value"
    )
