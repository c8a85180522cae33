"""safetensors files whose headers lie, and files that are not what their names say."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from catseg_fast.checkpoints.checkpoint import MAX_HEADER, read_checkpoint
from support.refusals import assert_refused

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}


def file_of(header: bytes, values: bytes = bytes(32)) -> bytes:
    return struct.pack("<Q", len(header)) + header + values


def entries(**changes: Any) -> bytes:
    return file_of(json.dumps({"a": A, "b": {**B, **changes}}).encode())


DAMAGED = "is a truncated or damaged safetensors file: "
LIES: dict[str, tuple[bytes, str]] = {
    "overlap": (entries(data_offsets=[8, 24]), DAMAGED),
    "the same place": (entries(data_offsets=[0, 16]), DAMAGED),
    "a gap": (entries(data_offsets=[20, 36]), DAMAGED),
    "negative": (entries(data_offsets=[-16, 0]), DAMAGED),
    "backwards": (entries(data_offsets=[32, 16]), DAMAGED),
    "beyond the end": (entries(shape=[2**40], data_offsets=[16, 16 + 2**42]), DAMAGED),
    "beyond 64 bits": (entries(data_offsets=[16, 2**64]), DAMAGED),
    "shape of another length": (entries(shape=[5]), DAMAGED),
    "shape that overflows": (entries(shape=[2**63, 2, 4]), DAMAGED),
    "negative shape": (entries(shape=[-2, -2]), DAMAGED),
    "unknown type": (entries(dtype="F4X"), DAMAGED),
    "offsets as text": (entries(data_offsets=["16", "32"]), DAMAGED),
    "one offset": (entries(data_offsets=[16]), DAMAGED),
    "values left over": (file_of(json.dumps({"a": A}).encode()), DAMAGED),
    "no UTF-8": (file_of(json.dumps({"a": A, "b": B}).encode().replace(b'"b"', b'"\xff"')), DAMAGED),
    "UTF-16": (file_of(json.dumps({"a": A, "b": B}).encode("utf-16-le")), DAMAGED),
    "lone surrogate": (file_of(json.dumps({"a": A, "\ud800": B}).encode()), DAMAGED),
    "control characters in a name": (
        file_of(json.dumps({"a": A, "\x1b[31m\u202e": B}).encode()), "parameter's name"
    ),
    "control characters in a message": (
        file_of(json.dumps({"\u202e": {**A, "data_offsets": [4, 20]}}).encode()), DAMAGED
    ),
    "header that ends behind the file": (file_of(b"{}" + b" " * 100)[:60], DAMAGED),
    "a huge number": (file_of(b'{"a":' + b"9" * 5000 + b"}"), DAMAGED),
    "a long name in a message": (
        file_of(json.dumps({"x" * 10**6: {**A, "data_offsets": [4, 20]}}).encode()), "x{300}…"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_headers_that_lie(case: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(entries())
    assert read_checkpoint(path).keys() == {"a", "b"}
    data, reason = LIES[case]
    path.write_bytes(data)
    assert_refused(path, None, reason)


@pytest.mark.parametrize("length", [*range(128, 400, 8), 0x4B50])
def test_headers_of_any_length(length: int, tmp_path: Path) -> None:
    """Its first bytes can be those of a pickle (128, 384), or of an archive (0x4B50)."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(file_of(json.dumps({"a": A, "b": B}).encode().ljust(length)))
    assert path.read_bytes()[0] == length % 256
    assert read_checkpoint(path).keys() == {"a", "b"}


@pytest.mark.parametrize("size", [MAX_HEADER + 1, 2**30])
def test_a_long_header_is_not_read(size: int, tmp_path: Path) -> None:
    """A file that is as long as it says, with room on the disk for some of it only."""
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", size) + b'{"a": "')
        file.truncate(8 + size)
    assert_refused(path, None, f"header has {size} bytes; at most {MAX_HEADER} are read")


def test_links(tmp_path: Path) -> None:
    target, link = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    target.write_bytes(save({"a": torch.ones(2)}))
    link.symlink_to(target)
    assert read_checkpoint(link).keys() == {"a"}
    for place, kind in (("/dev/zero", "a device"), ("fifo", "a FIFO")):
        link.unlink()
        if place == "fifo":
            os.mkfifo(tmp_path / place)
        link.symlink_to(tmp_path / place)
        assert_refused(link, None, f"is {kind}, not a regular file")
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(OSError, match=r"b\.safetensors"):
        read_checkpoint(link)
