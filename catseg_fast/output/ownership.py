"""Owners of files in an output folder: this picture, another picture, or not this package.

A result's JSON file has an "identity": the picture's place and content, and the content of its other files.
These have a mark with the picture's place, so that they are recognised if a run was killed before it wrote
the JSON file, which is removed first and written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from enum import Enum, auto
from pathlib import Path
from typing import Any

from catseg_fast.files import read_text
from catseg_fast.identity import content_digest, place_digest, place_of, read_mark, read_png_mark

PNG_SUFFIXES = (".overlay.png", ".labels.png")
# Optional files (`catseg_fast.output.formats`); the masks are a folder.
FORMAT_SUFFIXES = (".palette.png", ".masks", ".coco-rle.json", ".coco-polygons.json", ".top.npz")
VIDEO_SUFFIXES = (".overlay.mp4", ".labels")  # the labels are a folder of frames
TILED_SUFFIXES = (".overlay.png", ".labels.tif")  # of a picture that was segmented in tiles
OTHER_SUFFIXES = (*FORMAT_SUFFIXES, *VIDEO_SUFFIXES, ".labels.tif")  # files that not every result has


class Owner(Enum):
    """Owner of the files of a stem."""

    NOBODY = auto()  # there are none
    THIS_PICTURE = auto()
    OTHER_PICTURE = auto()
    STRANGER = auto()  # at least one is not of this package


def owner_of(folder: Path, stem: str, picture: Path | None) -> Owner:
    """Return the owner of `stem`.json, `stem`.overlay.png, `stem`.labels.png and other formats' files.

    Args:
        folder: folder of the results.
        stem: stem of their names.
        picture: the picture in question; with None, results of any picture are this picture's.
    """
    result = folder / f"{stem}.json"
    images = [path for suffix in PNG_SUFFIXES if os.path.lexists(path := folder / (stem + suffix))]
    marks = [read_png_mark(path) for path in images]
    others = [folder / (stem + suffix) for suffix in OTHER_SUFFIXES]
    other_marks = [read_mark(path) for path in others if os.path.lexists(path) and not _is_empty(path)]
    if None in other_marks:
        return Owner.STRANGER
    if os.path.lexists(result):
        content = read_result(result)
        if content is None:
            return Owner.STRANGER
        if "identity" in content:  # earlier versions wrote no marks
            for path, mark in zip(images, marks, strict=True):
                if mark is None and not _is_empty(path):
                    return Owner.STRANGER
        ours = picture is None or is_result_of(content, picture)
        return Owner.THIS_PICTURE if ours else Owner.OTHER_PICTURE
    marks += other_marks
    if not marks:
        return Owner.NOBODY
    if None in marks:
        return Owner.STRANGER
    ours = picture is None or set(marks) == {place_digest(picture)}
    return Owner.THIS_PICTURE if ours else Owner.OTHER_PICTURE


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the content of a result's JSON file; None for other files, or if it cannot be read."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(content, dict) and {"width", "height", "classes"} <= content.keys()
    return content if known and ("identity" in content or "fingerprint" in content) else None


def is_result_of(content: dict[str, Any], picture: Path) -> bool:
    """Check whether a result's JSON file is about a picture: the one at its place, or one moved since."""
    identity = content.get("identity")
    if identity is None or identity["path"] is None:
        return bool(content.get("image") == str(picture))
    if identity["path"] == place_of(picture):
        return True
    try:
        return not os.path.lexists(identity["path"]) and identity["content"] == content_digest(picture)
    except (OSError, ValueError):
        return False


def is_result(path: Path) -> bool:
    """Check whether a file is one of a result's."""
    if path.name.endswith(OTHER_SUFFIXES) or path.parent.suffix in (".masks", ".labels"):
        return read_mark(path) is not None
    if path.suffix == ".json":
        return read_result(path) is not None
    suffix = next((suffix for suffix in PNG_SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        return False
    if read_png_mark(path) is not None:
        return True
    stem = path.name.removesuffix(suffix)
    result = path.with_name(f"{stem}.json")
    content = read_result(result)
    if content is not None:
        return "identity" not in content or _is_empty(path)
    complete = all(path.with_name(stem + other).exists() for other in PNG_SUFFIXES)
    return complete and result.exists() and _is_damaged(result)


def _is_empty(path: Path) -> bool:
    """Check for an empty file, as after a power failure, or an empty folder, as of a killed run."""
    if path.is_dir():
        return not any(path.iterdir())
    return path.is_file() and path.stat().st_size == 0


def _is_damaged(path: Path) -> bool:
    """Check whether a file named .json is not JSON."""
    try:
        json.loads(read_text(path))
    except ValueError:
        return True
    except (OSError, RecursionError):
        return False
    return False


def unique_stems(
    paths: Iterable[Path], is_free: Callable[[Path, str], bool] = lambda path, stem: True
) -> list[str]:
    """Return a stem for each path's outputs: its own, numbered where two would meet ("photo", "photo-2").

    Args:
        paths: of pictures whose results go into one folder.
        is_free: tells whether a path's outputs can have a stem.
    """
    paths = list(paths)
    stems = [path.stem for path in paths]
    reserved = {stem.casefold() for stem in stems}  # some file systems ignore case
    taken: set[str] = set()
    unique = []
    for path, stem in zip(paths, stems, strict=True):
        candidate, number = stem, 1
        while (
            candidate.casefold() in taken
            or (number > 1 and candidate.casefold() in reserved)
            or not is_free(path, candidate)
        ):
            number += 1
            candidate = f"{stem}-{number}"
        taken.add(candidate.casefold())
        unique.append(candidate)
    return unique
