"""A file with one record per image, with which an interrupted evaluation continues."""

from __future__ import annotations

import json
import os
import reprlib
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catseg_fast.errors import InputError
from catseg_fast.files import acquire_lock

if TYPE_CHECKING:
    import filelock

Record = dict[str, Any]
CHECKSUM = "crc32"


class Ledger:
    """Records of finished images, a line of JSON each, in append-only files: one per process.

    A process that is killed while it writes leaves half a line, which is dropped when the ledger is read.
    Each line has a checksum; a damaged one is skipped with a warning. From `read` or `clear` to `close`, the
    ledger is locked: no other evaluation can use it.

    Args:
        folder: folder of the files NAME.RANK.jsonl.
        name: name of the evaluation.
        about: facts that the records depend on; they are in each file's first line.
    """

    def __init__(self, folder: Path, name: str, about: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, name
        self.about = json.loads(json.dumps(about))
        self._file: Any = None
        self._lock: filelock.BaseFileLock | None = None

    def read(self) -> dict[str, Record]:
        """Return the records of all processes, by "name". Only one process may read, before any writes.

        Raises:
            InputError: if they depend on other facts than `about`; the message names them.
            RunError: if another evaluation uses the ledger.
        """
        self._hold()
        try:
            records: dict[str, Record] = {}
            for path in self._paths():
                records |= self._read_file(path)
            return records
        except BaseException:
            self.close()
            raise

    def clear(self) -> None:
        """Forget all records.

        Raises:
            RunError: if another evaluation uses the ledger.
        """
        self._hold()
        for path in self._paths():
            path.unlink()

    def open(self, rank: int = 0) -> None:
        """Begin to write to the file of process `rank`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"{self.name}.{rank}.jsonl").open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self.add(self.about)

    def close(self) -> None:
        """End writing, if it has begun, and unlock the ledger."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def add(self, record: Record) -> None:
        """Write the record of a finished image."""
        self._file.write(json.dumps({**record, CHECKSUM: _checksum(record)}) + "\n")
        self._file.flush()

    def _hold(self) -> None:
        if self._lock is None:
            self._lock = acquire_lock(self.folder / self.name, seconds=0)

    def _read_file(self, path: Path) -> dict[str, Record]:
        _drop_torn_line(path)
        lines = path.read_bytes().splitlines()
        if not lines:
            return {}
        try:
            about = _parse(lines[0])
        except ValueError as error:
            raise InputError(f"{path} is damaged, or not a file of an evaluation: {error}") from error
        if about != self.about:
            raise InputError(
                f"{path} is of another evaluation: {_difference(about, self.about)}; "
                "choose another folder, or start again (--restart)"
            )
        records: dict[str, Record] = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                record = _parse(line)
                records[record["name"]] = record
            except (ValueError, KeyError) as error:
                warnings.warn(
                    f"{path}: line {number} is damaged, and its image is evaluated again: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return records

    def _paths(self) -> list[Path]:
        return sorted(
            path
            for path in self.folder.glob("*.jsonl")
            if path.name.rsplit(".", 2)[0] == self.name and path.name.rsplit(".", 2)[1].isdigit()
        )


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _parse(line: bytes) -> Record:
    """Return the record in a line; raise an InputError if its checksum does not agree."""
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise InputError(str(error)) from error
    if not isinstance(record, dict) or CHECKSUM not in record:
        raise InputError("it is not a record with a checksum")
    if record.pop(CHECKSUM) != _checksum(record):
        raise InputError("its checksum does not agree")
    return record


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _difference(found: Record, wanted: Mapping[str, Any]) -> str:
    """Describe the difference of two headers."""
    keys = [key for key in (found | dict(wanted)) if found.get(key) != wanted.get(key)]
    pairs = ((key, reprlib.repr(found.get(key)), reprlib.repr(wanted.get(key))) for key in keys)
    return "; ".join(f"{key} was {was} and is {now}" for key, was, now in pairs)
