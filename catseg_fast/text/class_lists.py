"""Lists of class names: as users write them, in a line of text or a file; and those of known data sets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from catseg_fast.errors import InputError
from catseg_fast.files import read_text

# fmt: off
EVERYDAY_CLASSES = (
    "sky", "building", "road", "sidewalk", "tree", "grass", "mountain", "water", "person", "car", "bicycle",
    "dog", "cat", "wall", "floor", "window", "door", "table", "chair", "plant", "food", "book",
)

# What the scenes that the package's own weights know are made of: all grounds, and some things.
SCENE_CLASSES = (
    "wooden floor", "brick wall", "grass", "sand", "water", "tiled floor", "cloudy sky", "gravel",
    "checked orange heart", "checked white square", "checked turquoise cross", "dotted purple cross",
    "striped pink moon", "striped green ring", "plain red disc", "dotted blue star", "plain black triangle",
)
# fmt: on

# Files in lists/; each names its source and licence.
READY_LISTS = ("ade-150", "ade-847", "pc-459", "lvis-1203")


@dataclass(frozen=True)
class ReadyList:
    """The class names of a data set, and where they come from."""

    title: str
    about: str
    source: str
    licence: str
    note: str
    classes: list[str]


def ready_list(name: str) -> ReadyList:
    """A list by its name, whatever its case.

    Raises:
        InputError: if it is not one of `READY_LISTS`.
    """
    key = name.strip().lower()
    if key not in READY_LISTS:
        raise InputError(f"classes: no list is named {name!r}; choose one of {', '.join(READY_LISTS)}")
    path = Path(__file__).parent / "lists" / f"{key}.json"
    return ReadyList(**json.loads(path.read_text(encoding="utf-8")))


def parse_classes(text: str) -> list[str]:
    """The names of "sky; tree; person, man": semicolons separate classes, commas a class's synonyms.

    The name of a ready list, such as "ade-150", stands for its classes.

    Raises:
        InputError: if there is none.
    """
    if text.strip().lower() in READY_LISTS:
        return ready_list(text).classes
    return _some([name.strip() for name in text.split(";") if name.strip()], "the class list")


def read_classes(path: Path) -> list[str]:
    """The class names in a .txt file, one a line, or in a .json file, a list of strings; both in UTF-8.

    Raises:
        OSError: if the file cannot be read.
        InputError: if it is of another kind, damaged, or empty, or no regular file.
    """
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".json"):
        raise InputError(f"{path}: expected a .txt or a .json file")
    try:
        text = read_text(path, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if suffix == ".txt":
        return _some([line.strip() for line in text.splitlines() if line.strip()], str(path))
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: expected a JSON list of strings")
    return _some(names, str(path))


def _some(names: list[str], where: str) -> list[str]:
    if not names:
        raise InputError(f"{where} has no class names")
    return names
