"""The class list of a folder data set. Without torch."""

from __future__ import annotations

from pathlib import Path

from catseg_fast.errors import InputError
from catseg_fast.text.class_lists import read_classes
from catseg_fast.text.fold import Fold

CLASSES = "classes.json"
UNFINISHED = "classes.unfinished.json"  # its name while `catseg-fast dataset` works on the folder
MOST_CLASSES = 65535  # the last of 16 bits' values is where no class is right


def read_class_list(root: Path) -> tuple[tuple[str, ...], Fold | None]:
    """Return the classes of the data set in a folder, and the fold of their names if they have several.

    Raises:
        FileNotFoundError: if there is no `classes.json` in it.
        InputError: if that is not a list of 1 to 65535 names.
    """
    path = root / CLASSES
    if not path.exists() and (root / UNFINISHED).exists():
        raise FileNotFoundError(f"{root} is incomplete: repeat `catseg-fast dataset`, which was interrupted")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a data set needs it, a JSON list of class names")
    classes = read_classes(path)
    if len(classes) > MOST_CLASSES:
        raise InputError(f"{path}: {len(classes)} classes; indices of 16 bits count {MOST_CLASSES}")
    return tuple(classes), Fold.of(classes, str(path)) if isinstance(classes, dict) else None
