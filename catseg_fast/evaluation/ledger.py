"""A file of one record an image, from which an interrupted evaluation goes on."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Ledger:
    """Records of finished images, a line of JSON each, in append-only files: one a process.

    A process that is killed while it writes leaves half a line, which is dropped when the ledger is read.

    Args:
        folder: where the files are, or will be; NAME.RANK.jsonl.
        name: what the records are about.
        about: what the records depend on; it stands in each file's first line.
    """

    def __init__(self, folder: Path, name: str, about: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, name
        self.about = json.loads(json.dumps(about))
        self._file: Any = None

    def read(self) -> dict[str, Record]:
        """The records of all processes so far, by "name". Only one process may read, before any writes.

        Raises:
            ValueError: if they depend on something else than `about`; the message says on what.
        """
        records: dict[str, Record] = {}
        for path in self._paths():
            _drop_torn_line(path)
            lines = path.read_text(encoding="utf-8").splitlines()
            if not lines:
                continue
            try:
                about, *entries = map(json.loads, lines)
                found = {entry["name"]: entry for entry in entries}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} is damaged, or no file of an evaluation: {error!r}") from error
            if about != self.about:
                raise ValueError(
                    f"{path} is of another evaluation: {_difference(about, self.about)}; "
                    "evaluate into another folder, or start anew (--restart)"
                )
            records |= found
        return records

    def clear(self) -> None:
        """Forget all records."""
        for path in self._paths():
            path.unlink()

    def open(self, rank: int = 0) -> None:
        """Begin to write, in the file of process `rank`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"{self.name}.{rank}.jsonl").open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self.add(self.about)

    def close(self) -> None:
        """End writing, if it had begun."""
        if self._file is not None:
            self._file.close()

    def add(self, record: Record) -> None:
        """Keep the record of a finished image."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _paths(self) -> list[Path]:
        return sorted(
            path
            for path in self.folder.glob("*.jsonl")
            if path.name.rsplit(".", 2)[0] == self.name and path.name.rsplit(".", 2)[1].isdigit()
        )


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    """What two headers differ in."""
    if not isinstance(found, dict):
        return "its first line says nothing of one"
    keys = [key for key in (found | dict(wanted)) if found.get(key) != wanted.get(key)]
    pairs = ((key, reprlib.repr(found.get(key)), reprlib.repr(wanted.get(key))) for key in keys)
    return "; ".join(f"{key} was {was} and is {now}" for key, was, now in pairs)
