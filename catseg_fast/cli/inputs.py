"""Pictures among the command line's files, folders and globs, and the places of their results."""

from __future__ import annotations

import glob
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from catseg_fast.errors import InputError
from catseg_fast.inference.suffixes import picture_suffixes
from catseg_fast.output.ownership import PNG_SUFFIXES, Owner, is_result, owner_of, unique_stems


@dataclass(frozen=True)
class Picture:
    """A file, and the folder and stem of its results."""

    path: Path
    folder: Path
    stem: str

    def result(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}.{suffix}"


@dataclass
class _Search:
    """Numbers of files that a search skips, by reason.

    Attributes:
        output: folder of the results, resolved.
        results, hidden, links, unreadable: numbers of files or folders.
        others: numbers of files by suffix.
    """

    output: Path
    results: int = 0
    hidden: int = 0
    links: int = 0
    unreadable: int = 0
    others: Counter[str] = field(default_factory=Counter)

    def takes(self, path: Path, base: Path) -> bool:
        """Check whether `path`, found below `base`, is a picture; count it otherwise."""
        if is_result(path) or (path.name.endswith(PNG_SUFFIXES) and self._is_in_output(path, base)):
            self.results += 1
            return False
        if path.suffix.lower() not in picture_suffixes():
            self.others[path.suffix.lower() or "no suffix"] += 1
            return False
        return True

    def _is_in_output(self, path: Path, base: Path) -> bool:
        """Check whether a file is in an output folder that lies below the folder that is searched."""
        parents = _real(path).parents
        return self.output in parents and _real(base) in self.output.parents

    def summary(self) -> str:
        """Describe the skipped files; empty if there are none."""
        parts = []
        if self.results:
            parts.append(_number(self.results, "result") + " of catseg-fast")
        if self.others:
            common = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in common[:5])
            more = f", {len(common) - 5} other types" if len(common) > 5 else ""
            parts.append(f"{_number(self.others.total(), 'other file')} ({kinds}{more})")
        if self.hidden:
            parts.append(_number(self.hidden, "hidden file or folder", "hidden files and folders"))
        if self.links:
            parts.append(_number(self.links, "linked folder") + " already searched")
        if self.unreadable:
            parts.append(_number(self.unreadable, "folder") + " that cannot be read")
        return ", ".join(parts)


def find_pictures(
    arguments: Sequence[Path],
    output: Path,
    notice: Callable[[str], object] = lambda text: None,
    *,
    whole_folders: bool = False,
) -> list[Picture]:
    """Return the pictures of the arguments, in their order; those of folders and globs are sorted.

    Folders are searched recursively, and `output` gets the same tree; a linked folder is searched once.
    Results of an earlier run are never pictures, in any place. A single file is returned even if it does not
    exist. Results never replace those of another picture, or other files: the stem is then numbered.

    Args:
        arguments: files, folders and globs.
        output: folder of the results.
        notice: called with a line on skipped files, and for each stem that is numbered because of another
            file.
        whole_folders: treat each folder as one picture, for the frames of a video.

    Raises:
        InputError: if a folder holds no pictures, or there are only results; or for a URL.
    """
    found: list[tuple[Path, Path]] = []
    resolved = _real(output)
    explicit_results = 0
    for argument in arguments:
        search = _Search(resolved)
        if argument.parts[:1] in (("http:",), ("https:",)) and not argument.exists():
            raise InputError(f"{argument}: is a URL; download it first, or use CATSeg.segment in Python")
        if argument.is_dir() and not whole_folders:
            inside = sorted(path for path in _walk(argument, search) if search.takes(path, argument))
            if not inside and not search.results:
                left_out = search.summary()
                raise InputError(f"{argument} holds no pictures{left_out and f', only {left_out}'}")
            found += [(path, output / path.relative_to(argument).parent) for path in inside]
        elif not argument.exists() and glob.has_magic(str(argument)):
            found += [(path, output) for path in _expand(argument, search)]
        elif is_result(argument):  # of a glob that the shell expanded
            explicit_results += 1
        else:
            found.append((argument, output))
        if summary := search.summary():
            notice(f"{argument}: left out {summary}")
    if explicit_results:
        text = _number(explicit_results, "file") + f" of {len(arguments)} arguments"
        notice(f"left out {text}: results of catseg-fast")
    if arguments and not found:
        raise InputError(f"{arguments[0]}: there are only results of catseg-fast and no pictures")
    return _with_stems(found, notice)


def require_one(pictures: Sequence[Picture]) -> None:
    """Check that at least one picture exists; missing ones are later reported one by one.

    Raises:
        FileNotFoundError: if there are pictures and none exists.
    """
    if pictures and not any(picture.path.exists() for picture in pictures):
        more = f", nor one of the other {len(pictures) - 1}" if len(pictures) > 1 else ""
        raise FileNotFoundError(f"image: no such file: {str(pictures[0].path)!r}{more}")


def _with_stems(found: Sequence[tuple[Path, Path]], notice: Callable[[str], object]) -> list[Picture]:
    """Choose the stem of each picture's results, given the pictures and the folders of their results."""
    by_folder: dict[Path, list[int]] = defaultdict(list)
    for index, (_, folder) in enumerate(found):
        by_folder[folder].append(index)
    stems = [""] * len(found)
    for folder, indices in by_folder.items():
        strangers: dict[Path, str] = {}
        names = unique_stems((found[index][0] for index in indices), partial(_is_free, folder, strangers))
        for index, stem in zip(indices, names, strict=True):
            stems[index] = stem
            path = found[index][0]
            if path in strangers:
                notice(
                    f"{path}: its results are {folder / stem}.*; a file named {strangers[path]}.* is not a "
                    "result of catseg-fast"
                )
    return [Picture(path, folder, stem) for (path, folder), stem in zip(found, stems, strict=True)]


def _is_free(folder: Path, strangers: dict[Path, str], path: Path, stem: str) -> bool:
    """Check whether a picture's results can have a stem; add files of others to `strangers`."""
    owner = owner_of(folder, stem, path)
    if owner is Owner.STRANGER:
        strangers.setdefault(path, stem)
    return owner in (Owner.NOBODY, Owner.THIS_PICTURE)


def _walk(folder: Path, search: _Search) -> Iterator[Path]:
    """Yield all files in a folder; those behind links come last, unless they were found before."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]

    def skip(error: OSError) -> None:
        search.unreadable += 1

    while waiting:
        start = waiting.pop(0)
        links: list[Path] = []
        for parent, folders, files in os.walk(start, onerror=skip):
            here = os.stat(parent)
            if (here.st_dev, here.st_ino) in seen:
                search.links += 1
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            visible = [name for name in sorted(folders) if name[0] != "."]
            search.hidden += len(folders) - len(visible)
            links += [path for name in visible if (path := Path(parent, name)).is_symlink()]
            folders[:] = [name for name in visible if not Path(parent, name).is_symlink()]
            shown = [name for name in files if name[0] != "."]
            search.hidden += len(files) - len(shown)
            yield from (Path(parent, name) for name in shown)
        waiting += links


def _expand(argument: Path, search: _Search) -> list[Path]:
    """Return the pictures that match a glob that the shell did not expand; the glob if nothing matches."""
    pattern = str(argument)
    parts = argument.parts
    base = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
    matches = (Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
    found = [path for path in matches if path.is_file() and search.takes(path, base)]
    return found if found or search.results else [argument]  # which is then reported as missing


def _real(path: Path) -> Path:
    """A path with links resolved; `Path.resolve` fails for links that lead to themselves."""
    return Path(os.path.realpath(path))


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
