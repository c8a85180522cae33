"""Files of `torch.save`, read as data: a zip archive of a pickle and storages or, in the old format, pickles.

The file is mapped into memory, and no more bytes are allocated than it has. torch's own reader is not used,
as it trusts the archive's headers.
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from catseg_fast.checkpoints.stand_ins import FUNCTIONS, NAMES, STORAGES, Storage
from catseg_fast.checkpoints.unpickle import Global, RefusedPickle, shown, unpickle

ZIP, PICKLE = b"PK", b"\x80"  # how files of torch.save start, and how plain pickles do
# Files in the format before zip archives are pickles, the first of which is this number.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_LEGACY_VERSION = 1001
LONGEST_REASON = 500  # characters of another library's message
MAX_DIRECTORY = 4 * 2**20  # bytes of a zip archive's table of contents: tens of thousands of storages
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of what comes behind it
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags of an entry
_ALIGNMENT = 8  # bytes, of the largest type


def read_torch_file(file: IO[bytes], path: Path, *, mapped: bool = True, verify: bool = False) -> Any:
    """Return the content of a file of `torch.save` on the CPU: tensors, and plain Python values.

    Args:
        file: the file, open and not empty.
        path: path of the file for error messages.
        mapped: leave the tensors in the file, which must then not change; otherwise read them.
        verify: compare every entry of an archive with its checksum.

    Raises:
        ValueError: if the file is truncated or damaged, or not plain data.
    """
    try:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if content[: len(ZIP)] == ZIP:
            return _read_archive(content, mapped, verify)
        if content[: len(_LEGACY)] != _LEGACY:
            raise RefusedPickle("it is a plain pickle")
        return _read_legacy(content)
    except RefusedPickle as error:
        raise ValueError(
            f"{path} is refused: reading it could execute code ({error}). Ask its origin for a safetensors "
            "file, or convert it to one on a machine where it can do no harm"
        ) from error
    except Exception as error:  # many types, depending on the fault
        reason = shown(str(error), LONGEST_REASON)  # which can have bytes of the file
        raise ValueError(f"{path} is truncated, damaged or of another kind: {reason}") from error


class _Entry(NamedTuple):
    """Position of an entry's bytes in an archive."""

    start: int
    stop: int
    checksum: int


class _Directory:
    """A mapped file for `zipfile` that limits the length of the table of contents, which is read at once."""

    def __init__(self, content: mmap.mmap) -> None:
        self.seek, self.tell, self._content = content.seek, content.tell, content

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError(f"a table of contents of {size} bytes; at most {MAX_DIRECTORY} are read")
        return self._content.read(size if size >= 0 else MAX_DIRECTORY)


def _read_archive(content: mmap.mmap, mapped: bool, verify: bool) -> Any:
    entries = _entries(content)
    pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise ValueError(f"an archive with {len(pickles)} data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise ValueError("a TorchScript archive (as OpenAI's CLIP files are), no checkpoint")
    if (order := entries.get(f"{prefix}byteorder")) and content[order.start : order.stop] != b"little":
        raise ValueError("it has another byte order than little-endian")
    if verify:
        for name, entry in entries.items():
            with memoryview(content) as view:
                if zlib.crc32(view[entry.start : entry.stop]) != entry.checksum:
                    raise ValueError(f"the checksum of {shown(name)} is not that of its content")

    dtypes: dict[str, torch.dtype] = {}

    def storage(identity: Any) -> Storage:
        dtype, key, elements = _storage_identity(identity, 5)
        if dtypes.setdefault(key, dtype) != dtype:
            raise ValueError(f"storage {shown(key)} has two types")
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise ValueError(f"there is no storage {shown(key)}")
        if entry.stop - entry.start != elements * dtype.itemsize:
            raise ValueError(
                f"storage {shown(key)} has {entry.stop - entry.start} bytes, but should have "
                f"{elements} elements of {dtype.itemsize}"
            )
        return Storage(_values(content, entry.start, entry.stop, mapped), dtype)

    entry = entries[pickles[0]]
    content.seek(entry.start)
    value = unpickle(content, FUNCTIONS, NAMES, storage)  # type: ignore[arg-type]  # a mapping reads as a file
    if content.tell() != entry.stop:
        raise ValueError("the pickle does not end where its entry does")
    return value


def _entries(content: mmap.mmap) -> dict[str, _Entry]:
    """Return the entries of an archive by name, all uncompressed, inside of the file and without overlaps."""
    with zipfile.ZipFile(_Directory(content)) as archive:  # type: ignore[call-overload]
        infos, directory = archive.infolist(), archive.start_dir
    entries: dict[str, _Entry] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.orig_filename
        if name in entries:
            raise ValueError(f"the archive has two entries {shown(name)}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise ValueError(f"the archive's entry {shown(name)} is compressed or encrypted")
        begin = info.header_offset
        if begin < end or begin + _LOCAL_HEADER.size > directory:
            raise ValueError(f"the archive's entry {shown(name)} is not inside of it, or overlaps another")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(content, begin)
        start = begin + _LOCAL_HEADER.size + name_length + extra_length
        end = start + info.file_size
        stored = content[start - name_length - extra_length : start - extra_length]
        encoded = name.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        if signature != b"PK\x03\x04" or stored != encoded or info.compress_size != info.file_size:
            raise ValueError(f"the archive's entry {shown(name)} differs from its table of contents")
        if end > directory:
            raise ValueError(f"the archive's entry {shown(name)} is not inside of it, or overlaps another")
        entries[name] = _Entry(start, end, info.CRC)
    return entries


def _values(content: mmap.mmap, start: int, stop: int, mapped: bool) -> Tensor:
    """Return bytes of the file as a tensor with its own storage, which is mapped if they are aligned."""
    if start == stop:
        return torch.empty(0, dtype=torch.uint8)
    values = torch.frombuffer(content, dtype=torch.uint8, count=stop - start, offset=start)
    return values if mapped and start % _ALIGNMENT == 0 else values.clone()


def _storage_identity(identity: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Return type, key and number of elements of a storage from its persistent id."""
    if type(identity) is not tuple or len(identity) != length:
        raise ValueError("the persistent id of a storage is not valid")
    kind, storage, key, _, elements, *view = identity
    valid = type(kind) is str and kind == "storage" and type(key) is str
    valid = valid and type(elements) is int and 0 <= elements < 2**60 and all(x is None for x in view)
    if not valid or type(storage) is not Global or storage.name not in STORAGES:
        raise ValueError("the persistent id of a storage is not valid")
    return STORAGES[storage.name], key, elements


def _read_legacy(content: mmap.mmap) -> Any:
    def plain() -> Any:
        return unpickle(content, {})  # type: ignore[arg-type]  # a mapping reads as a file

    plain()  # the number that tells the format
    version, system = plain(), plain()
    if type(version) is not int or version != _LEGACY_VERSION:
        raise ValueError("its version is not supported")
    if type(system) is not dict or system.get("little_endian") is not True or sys.byteorder != "little":
        raise ValueError("it has another byte order than little-endian")
    storages: dict[str, Storage] = {}
    left = len(content)

    def storage(identity: Any) -> Storage:
        """Return memory for a storage, whose bytes follow the pickle."""
        nonlocal left
        dtype, key, elements = _storage_identity(identity, 6)
        size = elements * dtype.itemsize
        if key not in storages:
            left -= size
            if left < 0:
                raise ValueError(f"its storages have more than the {len(content)} bytes of the file")
            storages[key] = Storage(torch.empty(size, dtype=torch.uint8), dtype)
        if storages[key].dtype != dtype or storages[key].values.numel() != size:
            raise ValueError(f"storage {shown(key)} has two types or lengths")
        return storages[key]

    value = unpickle(content, FUNCTIONS, NAMES, storage)  # type: ignore[arg-type]
    keys = plain()
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError("it has no list of storages")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise ValueError("its list of storages is not that of its pickle")
    for key in keys:
        values, dtype = storages[key]
        elements, start = int.from_bytes(content.read(8), "little"), content.tell()
        stop = start + values.numel()
        if stop > len(content) or elements * dtype.itemsize != values.numel():
            raise ValueError(f"storage {shown(key)} is truncated, or of another length than it should be")
        values.copy_(_values(content, start, stop, mapped=True))
        content.seek(stop)
    return value
