"""Zip archives and safetensors files whose headers lie, at random.

An archive is built from its records, any of whose fields can have another value than it should; so are the
entries of a safetensors header.
"""

from __future__ import annotations

import json
import random
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from support.hostile_files import RAW, TENSOR, Case, in_model

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64, LOCATOR = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")

SMALL = (0, 1, 2, 8, 12, 20, 45, 63, 64, 65, 255)
LIES = (*SMALL, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
LIES64 = (*LIES, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NAMES = (
    "w/data.pkl", "w/data/0", "w/data/1", "v/data.pkl", "data.pkl", "w/../w/data/0", "/w/data/0", "w//data/0",
    "w\\data\\0", "w/data/0/", "w/byteorder", "w/constants.pkl", "w/.data/serialization_id", "", "é",
    "a" * 999,
)  # fmt: skip


@dataclass
class Entry:
    """An entry of an archive: what it holds, and values that its headers have instead of the right ones."""

    name: bytes
    data: bytes
    lies: dict[str, int] = field(default_factory=dict)
    deflated: bool = False
    mode: int = 0
    zip64: bytes = b""
    place: int = 0

    @property
    def stored(self) -> bytes:
        if not self.deflated:
            return self.data
        packer = zlib.compressobj(9, wbits=-15)
        return packer.compress(self.data) + packer.flush()

    def header(self, where: str, **own: int) -> dict[str, int]:
        values = {
            "flags": 0, "method": 8 * self.deflated, "crc": zlib.crc32(self.data), "packed": len(self.stored),
            "size": len(self.data), "name": len(self.name), "extra": len(self.zip64), "comment": 0,
            "disk": 0, "mode": self.mode << 16, "offset": self.place, **own,
        }  # fmt: skip
        return values | {key[2:]: value for key, value in self.lies.items() if key[0] == where}

    def local(self) -> bytes:
        v = self.header("l")
        fields = 20, v["flags"], v["method"], 0, 0, v["crc"], v["packed"], v["size"], v["name"], v["extra"]
        return LOCAL.pack(b"PK\x03\x04", *cut(LOCAL, fields)) + self.name + self.zip64 + self.stored

    def central(self) -> bytes:
        v = self.header("c")
        fields = (
            20, 20, v["flags"], v["method"], 0, 0, v["crc"], v["packed"], v["size"], v["name"], v["extra"],
            v["comment"], v["disk"], 0, v["mode"], v["offset"],
        )  # fmt: skip
        return CENTRAL.pack(b"PK\x01\x02", *cut(CENTRAL, fields)) + self.name + self.zip64


def cut(record: struct.Struct, values: tuple[int, ...]) -> list[int]:
    """Cut numbers to the sizes of a record's fields."""
    codes = record.format.removeprefix("<4s")
    sizes = []
    number = ""
    for code in codes:
        if code.isdigit():
            number += code
        else:
            sizes += [struct.calcsize(f"<{code}")] * int(number or 1)
            number = ""
    return [value & (1 << 8 * size) - 1 for value, size in zip(values, sizes, strict=True)]


def build(entries: list[Entry], *, end: dict[str, int], zip64: bool, before: bytes, comment: bytes) -> bytes:
    """An archive of these entries, with `end`'s values in the records at its end."""
    out = bytearray(before)
    for entry in entries:
        entry.place = len(out)
        out += entry.local()
    start = len(out)
    for entry in entries:
        out += entry.central()
    values = {"count": len(entries), "size": len(out) - start, "start": start, "comment": len(comment), **end}
    if zip64:
        place = end.get("end64", len(out))
        sizes = values["count"], values["count"], values["size"], values["start"]
        out += END64.pack(b"PK\x06\x06", *cut(END64, (end.get("length", 44), 45, 45, 0, 0, *sizes)))
        out += LOCATOR.pack(b"PK\x06\x07", *cut(LOCATOR, (0, place, 1)))
        values |= {"count": 2**16 - 1, "size": 2**32 - 1, "start": 2**32 - 1}
    fields = 0, 0, values["count"], values["count"], values["size"], values["start"], values["comment"]
    return bytes(out + END.pack(b"PK\x05\x06", *cut(END, fields)) + comment)


def archive_cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Archives of a valid checkpoint with some lies, and entries that it should not have."""
    for index in range(count):
        entries = [
            Entry(b"w/data.pkl", in_model(TENSOR)), Entry(b"w/byteorder", b"little"),
            Entry(b"w/data/0", RAW), Entry(b"w/data/1", b""), Entry(b"w/version", b"3\n"),
        ]  # fmt: skip
        end: dict[str, int] = {}
        zip64 = rng.random() < 0.3
        before = comment = b""
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            trick = rng.randrange(10)
            entry = rng.choice(entries)
            if trick < 3:
                key = rng.choice(
                    ("flags", "method", "crc", "packed", "size", "name", "extra", "offset", "disk")
                )
                for where in rng.choice(("c", "l", "cl")):
                    entry.lies[f"{where} {key}"] = rng.choice(LIES)
            elif trick == 3:
                end[rng.choice(("count", "size", "start", "comment", "end64", "length"))] = rng.choice(LIES64)
            elif trick == 4:
                name = rng.choice(NAMES).encode()
                data = rng.choice((b"", RAW, in_model(TENSOR), b"\x80\x02cos\nsystem\n."))
                entries.insert(rng.randrange(len(entries) + 1), Entry(name, data))
            elif trick == 5:
                entry.mode = rng.choice((stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR, stat.S_IFCHR)) | 0o777
                entry.data = rng.choice((entry.data, b"/dev/zero", b"../../etc/passwd"))
            elif trick == 6:  # a bomb, or only compressed
                entry.deflated = True
                entry.data = rng.choice((entry.data, bytes(2**20)))
            elif trick == 7:  # sizes of 64 bits behind the name, which 32 bits of ones point to
                values = rng.choices(LIES64, k=rng.randrange(4))
                entry.zip64 = struct.pack(
                    f"<2H{len(values)}Q", 1, rng.choice((8 * len(values), 4, 99)), *values
                )
                for key in ("packed", "size", "offset")[: len(values)]:
                    entry.lies[f"c {key}"] = 2**32 - 1
            elif trick == 8:
                before = rng.choice((b"PK", b"PK\x03\x04", RAW, b"#!/bin/sh\n", bytes(1000)))
            else:
                comment = rng.choice(
                    (RAW, END.pack(b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0), b"PK\x05\x06", bytes(999))
                )
        if rng.random() < 0.1:
            rng.shuffle(entries)
        yield f"archive {index}", build(entries, end=end, zip64=zip64, before=before, comment=comment)


OFFSETS: tuple[Any, ...] = (
    0, 1, -1, 8, 15, 16, 17, 32, 48, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63),
    10**30, 1.0, 0.5, 1e300, "0", None, True, [], {},
)  # fmt: skip
TYPES: tuple[Any, ...] = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "F4",
    "f32",
    "",
    4,
    None,
)
KEYS = ("a", "b", "__metadata__", "", "\u0000", "\u202e", "a" * 2000, "é", "a.b", "\ud800")


def safetensors_cases(rng: random.Random, count: int) -> Iterator[Case]:
    """safetensors files of three tensors with some lies in their headers, and around them."""
    for index in range(count):
        header: dict[str, Any] = {
            "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
            "c": {"dtype": "U8", "shape": [32], "data_offsets": [32, 64]},
            "__metadata__": {"format": "pt"},
        }
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            entry = header[rng.choice("abc")]
            if type(entry) is not dict:  # since an earlier trick
                continue
            trick = rng.randrange(8)
            if trick == 0:
                entry["data_offsets"] = rng.choices(OFFSETS, k=rng.choice((0, 1, 2, 2, 2, 2, 3)))
            elif trick == 1:
                entry["shape"] = rng.choices(OFFSETS, k=rng.randrange(5))
            elif trick == 2:
                entry["dtype"] = rng.choice(TYPES)
            elif trick == 3:  # overlaps
                entry["data_offsets"] = rng.choice(([0, 16], [16, 32], [8, 24], [32, 64], [0, 64]))
            elif trick == 4:
                entry.pop(rng.choice(list(entry) or ["dtype"]), None)
            elif trick == 5:
                header[rng.choice(KEYS)] = rng.choice((entry, None, 1, [], {}, {"x": 1}, {"x": "y"}, "text"))
            elif trick == 6:
                entry[rng.choice(KEYS)] = rng.choice(OFFSETS)
            else:
                header["__metadata__"] = rng.choice((None, {"a": 1}, {"a": {}}, [], {"\x1b[31m": "x"}))
        yield f"safetensors {index}", _written(rng, json.dumps(header, ensure_ascii=rng.random() < 0.9))


def _written(rng: random.Random, header: str) -> bytes:
    """A file of this header, which can be damaged, and 64 bytes of values."""
    encoded = header.encode("utf-8", "surrogatepass")
    length = len(encoded)
    trick = rng.randrange(16)
    if trick == 0:
        length = rng.choice((*LIES64, length - 1, length + 1, length + 64))
    elif trick == 1:
        place = rng.randrange(len(encoded))
        encoded = encoded[:place] + rng.choice((b"\xff", b"\x00", b"\xed\xa0\x80", b"\xc3")) + encoded[place:]
        length = len(encoded)
    elif trick == 2:
        encoded = rng.choice(
            (b"{}", b"{", b"{" * 5000, b'{"a":' + b"9" * 6000 + b"}", b'{"a":NaN}', b"{\xef\xbb\xbf}")
        )
        length = len(encoded)
    elif trick == 3:  # the same key a second time
        encoded = encoded[:-1] + b', "a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}'
        length = len(encoded)
    elif trick == 4:
        encoded += b" " * rng.randrange(1, 64)
        length = len(encoded)
    data = RAW if trick != 5 else RAW[: rng.randrange(65)] + RAW[: rng.randrange(3)]
    return struct.pack("<Q", length) + encoded + data
