"""Text features on disk, so that a second start encodes nothing.

A cache's folder holds one folder per key (text tower, number of prompts, type), with safetensors files of
some thousand texts' features each. A file's entries are classes, so that a changed list of classes finds
those that it had. Files are written whole, their checksums are compared when they are read, and broken ones
are removed. Above the cache's limit, the files that were not used for longest are removed.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from catseg_fast.errors import InputError, InputTypeError
from catseg_fast.files import replacing, user_cache

LIMIT = 2 * 2**30
HEX = "[0-9a-f]" * 32  # names of folders and files; nothing else in the folder is touched

# More small files than this, left by vocabularies that were changed class by class, become one.
SMALL_FILES, SMALL = 32, 2**20
ABANDONED = 24 * 3600  # seconds after which a file that is still being written belongs to a killed process


class FeaturesCache:
    """Text features of classes in a folder.

    Args:
        folder: the cache's folder; by default `text-features` in the user's cache folder of the package.
        limit: bytes that the files may take together.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int = LIMIT) -> None:
        if limit <= 0:
            raise InputError(f"limit: {limit} bytes are not positive")
        self.folder = user_cache() / "text-features" if folder is None else Path(folder)
        self.limit = limit
        self._used: set[Path] = set()  # by the present vocabulary: not to be removed
        self._closed = False  # for the present vocabulary

    @classmethod
    def of(cls, setting: bool | str | os.PathLike[str] | FeaturesCache) -> FeaturesCache | None:
        """Return the cache that a setting asks for: the user's (True), none (False), a folder's, or itself.

        Raises:
            InputTypeError: if the setting is something else.
        """
        if isinstance(setting, FeaturesCache):
            return setting
        if isinstance(setting, bool):
            return cls() if setting else None
        if isinstance(setting, (str, os.PathLike)):
            return cls(setting)
        raise InputTypeError(
            f"text_cache: expected True, False, a folder or a FeaturesCache, not {setting!r}"
        )

    def load(self, key: str, names: set[str]) -> dict[str, Tensor]:
        """Return the existing entries among `names`, on the CPU; a new vocabulary begins."""
        self._used, self._closed = set(), False
        found: dict[str, Tensor] = {}
        with self._warn_of_folder():
            for path in self._files(key):
                if len(found) == len(names):
                    break
                entries = self._read(path, names - found.keys())
                if entries:
                    self._used.add(path)
                    with suppress(OSError):  # a cache may be for reading only
                        os.utime(path)
                found |= entries
        return found

    def store(self, key: str, entries: Mapping[str, Tensor]) -> None:
        """Add entries, if they fit beside the vocabulary's present ones; else warn once."""
        if self._closed:
            return
        size = sum(map(_size, self._used)) + sum(tensor.nbytes for tensor in entries.values())
        if size > self.limit:
            self._closed = True
            warnings.warn(
                f"{self.folder}: the text features of so many classes do not fit in the cache's limit of "
                f"{self.limit / 2**30:.1f} GiB; the rest is computed anew each time (a larger limit: "
                f"text_cache=FeaturesCache(limit=...))",
                stacklevel=2,
            )
            return
        with self._warn_of_folder():
            folder = self.folder / key
            folder.mkdir(parents=True, exist_ok=True)
            small = [path for path in self._files(key) if _size(path) < SMALL]
            merged = small if len(small) >= SMALL_FILES else []
            kept = {name: tensor for path in merged for name, tensor in self._read(path).items()}
            path = _write(folder, {**kept, **entries})
            self._used.add(path)
            for old in set(merged) - {path}:
                old.unlink(missing_ok=True)
            self._evict()

    def _files(self, key: str = HEX) -> list[Path]:
        return sorted(self.folder.glob(f"{key}/{HEX}.safetensors"))

    def _read(self, path: Path, names: set[str] | None = None) -> dict[str, Tensor]:
        """Return a file's entries, or those among `names`; none, with a warning, if it is broken."""
        try:
            with safe_open(path, "pt") as file:
                checksums = file.metadata() or {}
                wanted = file.keys() if names is None else names.intersection(file.keys())
                entries = {name: file.get_tensor(name) for name in wanted}
            for name, tensor in entries.items():
                if checksums.get(name) != _checksum(tensor):
                    raise InputError(f"the checksum of entry {name} differs")
        except FileNotFoundError:  # removed by another process
            return {}
        except (SafetensorError, OSError, ValueError) as error:
            warnings.warn(f"{path}: broken, not used: {error}", stacklevel=2)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return {}
        return entries

    def _evict(self) -> None:
        """Remove the least recently used files above the limit, and those of killed processes."""
        files = sorted(self._files(), key=_last_use)
        excess = sum(map(_size, files)) - self.limit
        for path in files:
            if excess <= 0:
                break
            if path not in self._used:
                excess -= _size(path)
                path.unlink(missing_ok=True)
        for path in self.folder.glob(f"{HEX}/.{HEX}.safetensors.*.tmp"):
            if _last_use(path) < time.time() - ABANDONED:
                path.unlink(missing_ok=True)

    @contextmanager
    def _warn_of_folder(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:  # the latter, too, if a disk is full
            self._closed = True
            warnings.warn(f"{self.folder}: text features cannot be kept there: {error}", stacklevel=4)


def _write(folder: Path, entries: Mapping[str, Tensor]) -> Path:
    """Write a file whose name follows from its entries'."""
    name = hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()[:32]
    path = folder / f"{name}.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in entries.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {name: _checksum(tensor) for name, tensor in tensors.items()})
    return path


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.view(torch.uint8).numpy().data):08x}"


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 if another process has removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
