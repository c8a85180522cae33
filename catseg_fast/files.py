"""Files: only regular ones are read, and those written are whole at every moment; the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, with links followed.

    A FIFO would wait for a writer, and a device such as /dev/zero has no end.

    Raises:
        OSError: if it cannot be opened; IsADirectoryError for a folder.
        ValueError: if it is a FIFO, a device or a socket.
    """
    mode = os.stat(path).st_mode  # opening a device can have an effect
    if not stat.S_ISDIR(mode):
        _require_regular(path, mode)
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)  # it may have changed since
    except ValueError:
        file.close()
        raise
    return file


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """The text in a regular file; errors as of `open_regular`, and UnicodeDecodeError."""
    with open_regular(path) as file:
        return file.read().decode(encoding)


def file_digest(file: BinaryIO, algorithm: str) -> str:
    """The digest of a file's content from where it is, in hexadecimal digits."""
    digest = hashlib.new(algorithm)
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _require_regular(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise ValueError(f"{os.fspath(path)} is {kind}, not a regular file")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden file's path beside `path`, and puts what is written there in its place at the end.

    After an error, or an interruption, what was at `path` is still there, and the hidden file is gone.

    Raises:
        OSError: if the file cannot be put in place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def user_cache() -> Path:
    """The package's cache folder: `$XDG_CACHE_HOME/catseg-fast`, by default in `~/.cache`."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache_home.is_absolute():  # the XDG specification says to ignore it
        cache_home = Path.home() / ".cache"
    return cache_home / "catseg-fast"
