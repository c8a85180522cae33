"""Files that are whole at every moment, and the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
