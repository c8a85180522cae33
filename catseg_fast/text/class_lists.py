"""Lists of class names: as users write them, in a line of text or a file; and those of known data sets."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catseg_fast.errors import InputError, InputTypeError, quoted
from catseg_fast.files import open_regular
from catseg_fast.text.fold import Fold, split_fold

# fmt: off
EVERYDAY_CLASSES = (
    "sky", "building", "road", "sidewalk", "tree", "grass", "mountain", "water", "person", "car", "bicycle",
    "dog", "cat", "wall", "floor", "window", "door", "table", "chair", "plant", "food", "book",
)

# Contents of the scenes that the bundled weights know: all grounds, and some things.
SCENE_CLASSES = (
    "wooden floor", "brick wall", "grass", "sand", "water", "tiled floor", "cloudy sky", "gravel",
    "checked orange heart", "checked white square", "checked turquoise cross", "dotted purple cross",
    "striped pink moon", "striped green ring", "plain red disc", "dotted blue star", "plain black triangle",
)
# fmt: on

# Files in lists/; each names its source and licence.
DATA_SET_LISTS = ("ade-150", "ade-847", "pc-459", "lvis-1203", "pas-20", "pas-20b")
NOUNS = "imagenet-12k"
READY_LISTS = (*DATA_SET_LISTS, NOUNS)

# One name per class, or each class's names, as `CATSeg.set_classes` takes them.
Names = list[str] | dict[str, list[str]]

# Characters that look like a separator, or are one elsewhere, but belong to the name here.
_LOOKALIKES = {
    "\uff1b": "a full-width semicolon",
    "\ufe54": "a small semicolon",
    "\u061b": "an Arabic semicolon",
    "\u037e": "a Greek question mark",
    "\uff0c": "a full-width comma",
    "\u3001": "an ideographic comma",
    "\u060c": "an Arabic comma",
    "|": "a vertical bar",
    "\t": "a tab",
}
_BYTE_ORDER_MARKS = {  # the longer ones first: that of UTF-32 starts with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_COMMENT = re.compile(r"(^|\s)#.*")


@dataclass(frozen=True)
class ReadyList:
    """The class names of a data set, and where they come from."""

    title: str
    about: str
    source: str
    licence: str
    note: str
    classes: Names


def ready_list(name: str) -> ReadyList:
    """Return a list by its name, in any case.

    Raises:
        InputError: if it is not one of `READY_LISTS`.
    """
    key = name.strip().lower()
    if key not in READY_LISTS:
        raise InputError(f"classes: no list is named {name!r}; choose one of {', '.join(READY_LISTS)}")
    if key == NOUNS:
        from catseg_fast.text.nouns import nouns

        return ReadyList(**nouns())
    path = Path(__file__).parent / "lists" / f"{key}.json"
    return ReadyList(**json.loads(path.read_text(encoding="utf-8")))


def parse_classes(text: str) -> Names:
    """Parse "sky; tree; person, man": semicolons separate classes, commas a class's synonyms.

    The name of a ready list, such as "ade-150", stands for its classes.

    Raises:
        InputError: if there is none.
    """
    if text.strip().lower() in READY_LISTS:
        return ready_list(text).classes
    return _some([name.strip() for name in text.split(";") if name.strip()], "the class list")


def read_classes(path: Path) -> Names:
    """Read class names from a text file in UTF-8.

    A .txt file has one class per line; blank lines are skipped, and a "#" at a line's start or after white
    space starts a comment. A .json file has a list of strings; or an object with the names of each class,
    `{"background": ["wall", "floor"]}`; or Hugging Face's id2label, an object from indices to names such as
    `{"0": "wall", "1": "sky"}`, which may be in a whole config.json.

    Raises:
        OSError: if the file cannot be read.
        InputError: if it is of another kind, damaged or empty, or not a regular file.
    """
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".json"):
        raise InputError(f"{path}: expected a .txt or a .json file")
    text = _read_utf8(path)
    if suffix == ".txt":
        lines = (_COMMENT.sub("", line).strip() for line in re.split(r"\r\n|\r|\n", text))
        return _some([line for line in lines if line], str(path))
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    names = _from_object(content, path) if isinstance(content, dict) else content
    if isinstance(names, dict):
        return names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: expected a JSON list of strings, or an object with lists of them")
    return _some(names, str(path))


def read_flat_classes(path: Path, purpose: str) -> list[str]:
    """Read classes that have one name each; see `read_classes`.

    Raises:
        InputError: if a class has several; the message begins with the path and names the purpose.
    """
    names = read_classes(path)
    if isinstance(names, dict):
        raise InputError(f"{path}: {purpose} takes one name per class; give a list of strings")
    return names


def separator_notes(names: Names, file: bool = False) -> list[str]:
    """Return remarks on names that may be several classes with other separators.

    Args:
        names: as read.
        file: whether they are from a file rather than a line of text.
    """
    rule = "lines (.txt) or strings (.json) separate classes" if file else "semicolons separate classes"
    notes = []
    flat, fold = split_fold(names)
    if fold is None and len(flat) == 1 and "," in flat[0]:
        count = flat[0].count(", ") + 1
        kind = f"one class with {count} synonyms" if count > 1 else "one class"
        notes.append(f"this is {kind}; {rule}: {quoted(flat[0], 60)}")
    suspects = dict(_LOOKALIKES)
    if file:
        suspects[";"] = "a semicolon"
    for character, title in suspects.items():
        found = [name for name in flat if character in name.strip()]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            notes.append(f"{quoted(found[0], 60)}{more} is one class with {title} in its name; {rule}")
    lists = [name for name in flat if name.strip().lower() in READY_LISTS]
    if lists:
        notes.append(f"{quoted(lists[0])} is a class of that name here; to use the list, name nothing else")
    return notes


def _read_utf8(path: Path) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        OSError: if it cannot be read.
        InputError: if it is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read()
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content:
        encoding = "UTF-16 or binary"
    if encoding is not None:
        raise InputError(f"{path} is {encoding}, not UTF-8: save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object, and refuse repeated keys, of which Python would keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise InputError(f"the key {quoted(twice)} is listed twice")
    return content


def _from_object(content: dict[str, Any], path: Path) -> Names:
    """Return the names in a JSON object: by class, or by index."""
    labels = content.get("id2label")
    if not isinstance(labels, dict):
        labels = content
    if labels and all(key.isdecimal() and isinstance(name, str) for key, name in labels.items()):
        expected = dict.fromkeys(str(index) for index in range(len(labels)))
        if labels.keys() != expected.keys():
            odd = next(key for key in labels if key not in expected)
            raise InputError(
                f"{path}: expected the keys 0..{len(labels) - 1} for {len(labels)} names, as Hugging Face's "
                f"id2label has them; found the key {quoted(odd)}"
            )
        return [labels[key] for key in expected]
    try:
        Fold.of(content, str(path))
    except InputTypeError as error:  # of what is in a file
        raise InputError(str(error)) from error
    return {label: [some] if isinstance(some, str) else some for label, some in content.items()}


def _some(names: list[str], where: str) -> list[str]:
    if not names:
        raise InputError(f"{where} has no class names")
    return names
