"""Identity of files: content for what they hold, place for which one they are, a mark for who wrote them.

Code that continues earlier work compares these, not only names, sizes or times.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL.PngImagePlugin import PngInfo

from catseg_fast.files import file_digest, open_image, open_regular

_ALGORITHM = "blake2b"
SCENE_COMMENT = b"generated scene, catseg-fast"  # in the JPEG files
_MARK = "catseg-fast"  # keyword of the PNG's text chunk
JSON_MARK = NPZ_MARK = "catseg_fast_mark"  # entry of "info" in COCO files, array in files of numpy
_ENDS = 2**20  # bytes at either end of an MP4 or TIFF file that hold its comment


def content_digest(path: str | os.PathLike[str]) -> str:
    """The digest of a regular file's content; errors as of `catseg_fast.files.open_regular`."""
    with open_regular(path) as file:
        return file_digest(file, _ALGORITHM)[:32]


def result_digest(path: Path) -> str:
    """The digest of a result: of a file's content, or of the names and contents of a folder's files."""
    if not path.is_dir():
        return content_digest(path)
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    return settings_digest({name: content_digest(path / name) for name in names})


def settings_digest(settings: Mapping[str, Any]) -> str:
    """The digest of settings that JSON can hold."""
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def place_of(path: str | os.PathLike[str]) -> str:
    """The absolute path of a file, with links resolved in its folder's path but not in its name."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def place_digest(path: str | os.PathLike[str]) -> str:
    """The digest of a file's place, which does not reveal it."""
    return hashlib.blake2b(os.fsencode(place_of(path)), digest_size=16).hexdigest()


def is_scene(path: str | os.PathLike[str]) -> bool:
    """Check whether a file is a generated scene, which this package has written, by its comment."""
    try:
        with open_regular(path) as file, open_image(file, ("JPEG",)) as image:
            return bool(image.info.get("comment") == SCENE_COMMENT)
    except Exception:  # damaged files raise errors of many types
        return False


def png_mark(value: str) -> PngInfo:
    """A mark that says that this package wrote a PNG, and what for: the argument `pnginfo` of saving it."""
    info = PngInfo()
    info.add_text(_MARK, value)
    return info


def read_png_mark(path: str | os.PathLike[str]) -> str | None:
    """The value of a PNG's mark, which precedes its pixels; None for any other file."""
    try:
        with open_regular(path) as file, open_image(file, ("PNG",)) as image:
            return image.info.get(_MARK)
    except Exception:  # damaged files raise errors of many types
        return None


def file_mark(value: str) -> str:
    """A mark as `png_mark`'s, for the comment of an MP4 or a TIFF file."""
    return f"{_MARK} {value};"


def read_mark(path: Path) -> str | None:
    """The value of the mark of a PNG, MP4, TIFF or COCO file, or of all files in a folder; or None."""
    if path.suffix in (".mp4", ".tif"):
        return _read_file_mark(path)
    if path.is_dir():
        # After a power failure, files are empty.
        marks = {read_png_mark(entry) for entry in path.iterdir() if entry.is_dir() or entry.stat().st_size}
        return marks.pop() if len(marks) == 1 else None
    if path.suffix == ".png":
        return read_png_mark(path)
    if path.suffix == ".npz":
        return _read_npz_mark(path)
    try:
        with open_regular(path) as file:
            value = json.loads(file.read())["info"][JSON_MARK]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _read_file_mark(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            content = file.read(_ENDS)
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - _ENDS))
            found = re.search(rf"{_MARK} ([0-9a-f]*);".encode(), content + file.read())
    except (OSError, ValueError):
        return None
    return found[1].decode() if found else None


def _read_npz_mark(path: Path) -> str | None:
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            return str(arrays[NPZ_MARK])
    except Exception:  # damaged files raise errors of many types
        return None
