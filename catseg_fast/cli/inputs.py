"""From the command line's files, folders and globs to pictures, and where each one's results go."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from catseg_fast.output.results import unique_stems

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif")


@dataclass(frozen=True)
class Picture:
    """A file, and the folder and stem of its results."""

    path: Path
    folder: Path
    stem: str

    def result(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}.{suffix}"


def find_pictures(arguments: Sequence[Path], output: Path) -> list[Picture]:
    """The pictures that the arguments name, in their order; folders and globs in alphabetical order.

    Folders are searched with all folders in them, which `output` then has, too; hidden files, and results in
    `output`, are left out. A file is taken whether it exists or not.

    Raises:
        ValueError: if a folder holds no pictures.
    """
    found: list[tuple[Path, Path]] = []
    for argument in arguments:
        if argument.is_dir():
            inside = sorted(_walk(argument, output.resolve()))
            if not inside:
                raise ValueError(f"{argument} holds no pictures ({', '.join(SUFFIXES)})")
            found += [(path, output / path.relative_to(argument).parent) for path in inside]
        else:
            found += [(path, output) for path in _expand(argument, output.resolve())]
    by_folder: dict[Path, list[int]] = defaultdict(list)
    for index, (_, folder) in enumerate(found):
        by_folder[folder].append(index)
    stems = [""] * len(found)
    for indices in by_folder.values():
        names = unique_stems(found[index][0] for index in indices)
        for index, stem in zip(indices, names, strict=True):
            stems[index] = stem
    return [Picture(path, folder, stem) for (path, folder), stem in zip(found, stems, strict=True)]


def _walk(folder: Path, output: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).resolve() != output]
        yield from (Path(parent, name) for name in files if name[0] != "." and _is_picture(name))


def _expand(argument: Path, output: Path) -> list[Path]:
    """The pictures that match a glob which the shell did not expand; anything else is a file's name."""
    pattern = str(argument)
    if argument.exists() or not glob.has_magic(pattern):
        return [argument]
    matches = (Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if _is_picture(name))
    return [path for path in matches if path.is_file() and output not in path.resolve().parents] or [argument]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
