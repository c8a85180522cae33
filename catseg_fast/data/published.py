"""Published data sets as the folders that training and evaluation read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catseg_fast.data.folder import MOST_CLASSES, files_by_name, ignore_label_of, read_index_map
from catseg_fast.files import open_regular, replacing


def import_dataset(
    images: Path,
    annotations: Path,
    classes: Sequence[str],
    target: Path,
    *,
    first: int = 0,
    copy: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Make `target` a folder as `catseg_fast.data.folder.FolderDataset` reads it.

    A value v in an annotation is class v - `first`. No class is right where v is below `first`, or is
    the largest of its 8 or 16 bits and of no class. Images are linked; those without annotation are left out.
    What an interrupted call has made is kept.

    Args:
        images: folder of pictures.
        annotations: folder of index maps of the same names, PNG or TIFF, of 8 or 16 bits.
        classes: the class names.
        target: where to.
        first: the first class's value.
        copy: copy the images, rather than link them.
        advance: called with the number of annotations done and of all.

    Returns:
        The number of annotated images.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if there are no annotations, one has no image, cannot be read or holds a value of no
            class, there are too many classes, or `target` has other classes.
        OSError: if writing fails.
    """
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"classes: {len(classes)}; indices of 16 bits count {MOST_CLASSES}")
    pictures, maps = files_by_name(images), files_by_name(annotations)
    if not maps:
        raise ValueError(f"{annotations}: no annotations")
    for name, path in maps.items():
        if name not in pictures:
            raise ValueError(f"{path}: annotation without image: no {images / name}.*")
    for folder in ("images", "annotations"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    _write_classes(target / "classes.json", classes)
    advance(0, len(maps))
    for done, (name, path) in enumerate(maps.items(), 1):
        _place(pictures[name], target / "images" / pictures[name].name, copy)
        written = target / "annotations" / f"{name}.png"
        if not written.exists():
            with replacing(written) as temporary:
                Image.fromarray(_indices(path, len(classes), first)).save(temporary, format="PNG")
        advance(done, len(maps))
    return len(maps)


def _indices(path: Path, classes: int, first: int) -> np.ndarray:
    """An annotation as `FolderDataset` wants it: uint8, or uint16 for more than 255 classes."""
    values = read_index_map(path)
    indices = values.astype(np.int64) - first
    known = (indices >= 0) & (indices < classes)
    wrong = ~known & (values >= first) & (values != np.iinfo(values.dtype).max)
    if wrong.any():
        raise ValueError(
            f"{path}: the annotation has value {values[wrong].max()} in {wrong.sum()} pixels, "
            f"but {classes} classes are {first}..{first + classes - 1}"
        )
    indices[~known] = ignore_label_of(classes)
    return indices.astype(np.uint8 if classes <= 255 else np.uint16)


def _write_classes(path: Path, classes: Sequence[str]) -> None:
    text = json.dumps(list(classes), indent=0, ensure_ascii=False) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path}: the folder has other classes; choose another")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _place(source: Path, target: Path, copy: bool) -> None:
    if target.exists():
        return
    with replacing(target) as temporary:
        if copy:
            with open_regular(source) as original, temporary.open("wb") as written:
                shutil.copyfileobj(original, written)
        else:
            temporary.symlink_to(source.resolve())
