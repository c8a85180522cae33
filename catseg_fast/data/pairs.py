"""Pictures and their label maps in the folders of published data sets, nested ones as well."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from catseg_fast.errors import InputError
from catseg_fast.inference.suffixes import picture_suffixes

# Cityscapes: CITY_0_1_leftImg8bit.png has several files CITY_0_1_gtFine_*.png.
_CITYSCAPES_IMAGE = "_leftImg8bit"
_CITYSCAPES_MAP = re.compile(r"(.+)_gt(?:Fine|Coarse)_(labelTrainIds|labelIds|instanceIds|color)")
_CITYSCAPES_KINDS = ("labelTrainIds", "labelIds")  # the better one first

Key = tuple[str, str]  # the folder below the searched one, and the name


@dataclass(frozen=True)
class Pair:
    """A picture and its label map, and a name that no other pair has."""

    name: str
    image: Path
    annotation: Path


def find_pairs(
    images: Path, annotations: Path, notice: Callable[[str], object] = lambda text: None
) -> list[Pair]:
    """Match the files of two folders, and of the folders in them, by their paths without suffix.

    The endings of Cityscapes (`_leftImg8bit`, `_gtFine_labelTrainIds` and `_gtFine_labelIds`) do not count.
    A pair is named as its picture; with the folders' names before it where two pictures have one name.

    Args:
        images: folder of pictures.
        annotations: folder of label maps.
        notice: called with a line for what is left out.

    Raises:
        FileNotFoundError: if a folder is missing.
        InputError: if there are no label maps, one has no picture, or two files share a path without suffix.
    """
    pictures = _by_key(_files(images, notice), images, _picture_key)
    maps = _by_key(_chosen(_files(annotations, notice), annotations, notice), annotations, _map_key)
    if not maps:
        raise InputError(f"{annotations}: no annotations in it or in the folders in it")
    for key, path in maps.items():
        if key not in pictures:
            expected = images / key[0] / key[1]
            raise InputError(f"{path}: annotation without image: no {expected}.*")
    if missing := len(pictures) - len(maps):
        notice(f"{images}: left out {missing} images without annotation")
    most = Counter(name.casefold() for _, name in maps).most_common(1)[0][1]
    pairs = [
        Pair(name if most == 1 else _joined(parent, name), pictures[parent, name], path)
        for (parent, name), path in maps.items()
    ]
    names: dict[str, Path] = {}
    for pair in pairs:
        if (other := names.setdefault(pair.name.casefold(), pair.image)) != pair.image:
            raise InputError(f"{other} and {pair.image}: two images whose name would be {pair.name}")
    return pairs


def _files(folder: Path, notice: Callable[[str], object]) -> list[Path]:
    """The files in a folder and in those in it that are pictures by their suffixes, in their order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found, others = [], 0
    unreadable: list[OSError] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, onerror=unreadable.append, followlinks=True):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        paths = [Path(parent, name) for name in files if name[0] != "."]
        kept = [path for path in paths if path.suffix.lower() in picture_suffixes()]
        others += len(paths) - len(kept)
        found += kept
    if others:
        notice(f"{folder}: left out {others} files that are not images by their suffixes")
    if unreadable:
        notice(f"{folder}: left out {len(unreadable)} folders that cannot be read")
    return sorted(found)


def _by_key(files: list[Path], folder: Path, key_of: Callable[[str], str]) -> dict[Key, Path]:
    found: dict[Key, Path] = {}
    for path in files:
        key = (str(path.parent.relative_to(folder)), key_of(path.stem))
        if key in found:
            raise InputError(f"{found[key]} and {path}: two files of one name")
        found[key] = path
    return found


def _chosen(files: list[Path], folder: Path, notice: Callable[[str], object]) -> list[Path]:
    """The label maps among files; of Cityscapes' four kinds, one."""
    kinds = {path: match[2] for path in files if (match := _CITYSCAPES_MAP.fullmatch(path.stem))}
    kind = next((kind for kind in _CITYSCAPES_KINDS if kind in kinds.values()), None)
    kept = [path for path in files if kinds.get(path) in (None, kind)]
    if len(kept) < len(files):
        notice(f"{folder}: took *_{kind} and left out {len(files) - len(kept)} other files of Cityscapes")
    return kept


def _picture_key(stem: str) -> str:
    return stem.removesuffix(_CITYSCAPES_IMAGE)


def _map_key(stem: str) -> str:
    match = _CITYSCAPES_MAP.fullmatch(stem)
    return match[1] if match else stem


def _joined(parent: str, name: str) -> str:
    return name if parent == "." else "_".join((*Path(parent).parts, name))
