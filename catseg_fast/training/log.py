"""Log of a run's steps: lines of JSON, and TensorBoard's events if it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from catseg_fast.files import open_regular, write_text

LOG = "log.jsonl"


def is_log(path: Path) -> bool:
    """Check whether a file is empty, or starts as the log of a run does, whole or cut."""
    start = b'{"step": '
    try:
        with open_regular(path) as file:
            return start.startswith(file.read(len(start)))
    except (OSError, ValueError):
        return False


class Log:
    """Appends to `log.jsonl` and TensorBoard's events in a folder.

    Entries of an earlier run for `first_step` and later steps are removed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG
        if path.exists():
            _cut(path, first_step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, **values: float) -> None:
        """Write a step's values."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"train/{name}", value, step)

    def flush(self) -> None:
        """Write everything to the files."""
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _cut(path: Path, first_step: int) -> None:
    """Keep the lines before a step; an unfinished line of a killed process is removed."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(kept))
