"""Scenes written as a folder data set (`catseg_fast.data.folder`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from catseg_fast.data.scenes.scene import draw_scene
from catseg_fast.data.scenes.words import (
    GROUNDS,
    HELD_OUT,
    SYNONYMS,
    TRAINED,
    Composition,
    choose_held_out,
)
from catseg_fast.errors import InputError
from catseg_fast.files import exclusive, replacing, write_text
from catseg_fast.identity import SCENE_COMMENT
from catseg_fast.numeric import whole

Thing = str | Composition
NAMED_HELD_OUT, NAMED_GROUNDS = 16, 4  # in the class list of held-out scenes


@dataclass(frozen=True)
class Split:
    """Contents of scenes, and further names in the class list.

    Attributes:
        things, grounds: that may be in a scene.
        absent: further classes that never are.
        names: how a class is written.
    """

    things: tuple[Composition, ...]
    grounds: tuple[str, ...]
    absent: tuple[Thing, ...]
    names: Callable[[Thing], str]

    @property
    def classes(self) -> tuple[Thing, ...]:
        """Grounds, things, and the absent ones: the order of the class list."""
        return (*self.grounds, *self.things, *self.absent)

    @property
    def class_names(self) -> list[str]:
        """The class list, as it is written."""
        return [self.names(thing) for thing in self.classes]


def _label(thing: Thing) -> str:
    return f"{thing}, {SYNONYMS[thing]}" if isinstance(thing, str) else thing.label


def _name(thing: Thing) -> str:
    return thing if isinstance(thing, str) else thing.name


def _synonym(thing: Thing) -> str:
    return SYNONYMS[thing] if isinstance(thing, str) else thing.synonym


def _held_out(classes: int, names: Callable[[Thing], str]) -> Split:
    things = choose_held_out(NAMED_HELD_OUT)
    grounds = GROUNDS[:NAMED_GROUNDS]
    others = [thing for thing in (*HELD_OUT, *TRAINED) if thing not in things]
    rest: tuple[Thing, ...] = (*GROUNDS[NAMED_GROUNDS:], *others)
    absent = rest[: classes - len(things) - len(grounds)]
    return Split(things, grounds, absent, names)


SPLITS: dict[str, Split] = {
    "train": Split(TRAINED, GROUNDS, (), _label),
    "held-out": _held_out(20, _name),
    "held-out-200": _held_out(200, _name),
    "synonyms": _held_out(20, _synonym),
}


def write_dataset(
    folder: Path, split: str, count: int, *, seed: int = 0, size: tuple[int, int] = (384, 384),
    processes: int | None = None, advance: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Write scenes as `images/`, `annotations/` and `classes.json`; what is there already stays.

    Each scene only depends on split, seed, size and its own number.

    Args:
        folder: is made if need be.
        split: one of `SPLITS`.
        count: of scenes.
        seed: of all of them.
        size: (H, W) in pixels.
        processes: that draw; by default one a core.
        advance: called after each scene.

    Raises:
        InputError: if there is no such split, a number is out of range, or the folder has other scenes.
        RunError: if another call writes to the folder.
        OSError: if writing fails; FileExistsError if the folder has files of something else.
    """
    if split not in SPLITS:
        raise InputError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    whole(count, "count")
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder, seconds=1):
        _write_dataset(folder, split, count, seed, size, processes, advance)


def _write_dataset(
    folder: Path, split: str, count: int, seed: int, size: tuple[int, int], processes: int | None,
    advance: Callable[[], object],
) -> None:  # fmt: skip
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / "scenes.json").exists():
        for name in ("images", "annotations"):
            if other := next((folder / name).iterdir(), None):
                raise FileExistsError(f"{other} is not of generated scenes; choose another folder")
    _write_once(folder / "scenes.json", {"split": split, "seed": seed, "size": list(size)})
    missing = [n for n in range(count) if not (folder / "annotations" / f"{n:06}.png").exists()]
    draw = partial(_write_scene, folder, split, seed, size)
    for _ in range(count - len(missing)):
        advance()
    with ProcessPoolExecutor(processes) as pool:
        for _ in pool.map(draw, missing, chunksize=4):
            advance()
    # Last, as without it nothing reads the folder.
    _write_once(folder / "classes.json", SPLITS[split].class_names)


def _write_scene(folder: Path, split: str, seed: int, size: tuple[int, int], number: int) -> None:
    """Draw and write one scene, the annotation last."""
    recipe = SPLITS[split]
    scene = draw_scene(np.random.default_rng([seed, number]), recipe.things, recipe.grounds, size)
    indices = np.array([recipe.classes.index(thing) for thing in scene.things])
    annotation = indices.astype(np.uint16 if len(recipe.classes) > 255 else np.uint8)[scene.labels]
    stem = f"{number:06}"
    for path, array, options in (
        (
            folder / "images" / f"{stem}.jpg",
            scene.image,
            {"format": "JPEG", "quality": 92, "comment": SCENE_COMMENT},
        ),
        (folder / "annotations" / f"{stem}.png", annotation, {"format": "PNG"}),
    ):
        with replacing(path) as temporary:
            Image.fromarray(array).save(temporary, **options)


def _write_once(path: Path, content: object) -> None:
    """Write JSON, or check that the file has it already."""
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"folder: {path} is damaged: {error}") from error
        if found != content:
            raise InputError(f"folder: {path} is of other scenes: {found!s:.60}, not {content!s:.60}")
        return
    write_text(path, json.dumps(content, indent=0, ensure_ascii=False) + "\n")
