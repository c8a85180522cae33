"""Published data sets as the folders that training and evaluation read."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catseg_fast.data.class_list import CLASSES, MOST_CLASSES, UNFINISHED
from catseg_fast.data.folder import ignore_label_of, read_index_map
from catseg_fast.data.pairs import Pair, find_pairs
from catseg_fast.errors import InputError
from catseg_fast.files import exclusive, open_regular, read_text, replacing, sweep, write_text
from catseg_fast.identity import content_digest, png_mark, read_png_mark
from catseg_fast.inference.images import image_size
from catseg_fast.text.fold import ClassNames


def import_dataset(
    images: Path,
    annotations: Path,
    classes: ClassNames,
    target: Path,
    *,
    first: int = 0,
    copy: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
    notice: Callable[[str], object] = lambda text: None,
) -> int:
    """Make `target` a folder as `catseg_fast.data.folder.FolderDataset` reads it.

    A value v in an annotation is class v - `first`. No class is right where v is below `first`, or is
    the largest of its 8 or 16 bits and of no class. Images are linked; those without annotation are left out.
    Folders are searched with all folders in them, as of `catseg_fast.data.pairs.find_pairs`.

    What an earlier call has made is kept where it is what this one would make, and made again otherwise.
    Files of others are never replaced. Until the call has ended there is no `classes.json`, so that nothing
    reads a half of the folder.

    Args:
        images: folder of pictures.
        annotations: folder of index maps of the same names, PNG or TIFF, of 8 or 16 bits.
        classes: the class names, or the several names of each class.
        target: where to.
        first: the first class's value.
        copy: copy the images, rather than link them.
        advance: called with the number of annotations done and of all.
        notice: called with a line for what is left out.

    Returns:
        The number of annotated images.

    Raises:
        FileNotFoundError: if a folder is missing.
        InputError: if there are no annotations, one has no image or another size than its image, cannot be
            read or holds a value of no class, there are too many classes, or `target` has other classes.
        RunError: if another call works on `target`.
        OSError: if writing fails; FileExistsError if a file is in the way that no call has made.
    """
    if len(classes) > MOST_CLASSES:
        raise InputError(f"classes: {len(classes)}; indices of 16 bits count {MOST_CLASSES}")
    pairs = find_pairs(images, annotations, notice)
    target.mkdir(parents=True, exist_ok=True)
    with exclusive(target, seconds=1):
        return _import(pairs, classes, target, images, first, copy, advance, notice)


def _import(
    pairs: Sequence[Pair], classes: ClassNames, target: Path, images: Path, first: int, copy: bool,
    advance: Callable[[int, int], None], notice: Callable[[str], object],
) -> int:  # fmt: skip
    """Do as `import_dataset` with the pairs of files that were found."""
    for folder in ("images", "annotations"):
        (target / folder).mkdir(exist_ok=True)
        sweep(target / folder)  # nothing may be written to it any more
    work = _Work(target, classes)
    there: dict[str, list[Path]] = defaultdict(list)
    for path in (target / "images").iterdir():
        there[path.stem].append(path)
    advance(0, len(pairs))
    for done, pair in enumerate(pairs, 1):
        _import_pair(pair, _indices(pair.annotation, len(classes), first), work, there[pair.name], copy)
        advance(done, len(pairs))
    work.end()
    names = {pair.name for pair in pairs}
    if others := sum(path.stem not in names for path in (target / "annotations").glob("*.png")):
        notice(f"{target}: also has {others} images that are not in {images}")
    return len(pairs)


class _Work:
    """The folder that is made. Its class list has another name from the first change to the end.

    Attributes:
        target: the folder.
        resumed: whether an earlier call has not come to its end.

    Raises:
        ValueError: if the folder has other classes.
    """

    def __init__(self, target: Path, classes: ClassNames) -> None:
        self.target = target
        names = classes if isinstance(classes, Mapping) else list(classes)
        self._text = json.dumps(names, indent=0, ensure_ascii=False) + "\n"
        self._complete, self._unfinished = target / CLASSES, target / UNFINISHED
        for path in (self._complete, self._unfinished):
            if path.exists() and read_text(path) != self._text:
                raise InputError(f"{path}: the folder has other classes; choose another")
        self.resumed = self._unfinished.exists()
        self._begun = self.resumed and not self._complete.exists()

    def begin(self) -> None:
        """Call this before each change."""
        if self._begun:
            return
        if self._complete.exists():
            os.replace(self._complete, self._unfinished)
        else:
            write_text(self._unfinished, self._text)
        self._begun = True

    def end(self) -> None:
        """Call this when everything is in its place."""
        if not self._complete.exists():
            self.begin()
            os.replace(self._unfinished, self._complete)


def _import_pair(pair: Pair, indices: np.ndarray, work: _Work, there: Sequence[Path], copy: bool) -> None:
    """Put a picture and its index map in their places; `there` are the files of its name in `images`."""
    size = image_size(pair.image)
    if indices.shape != size:
        sizes = [f"{width}x{height}" for height, width in (indices.shape, size)]
        raise InputError(
            f"{pair.annotation}: the annotation is {sizes[0]}, its image {pair.image} is {sizes[1]}"
        )
    image = work.target / "images" / f"{pair.name}{pair.image.suffix}"
    written = work.target / "annotations" / f"{pair.name}.png"
    placed = list(there) == [image] and _is_placed(pair.image, image, copy)
    same = _holds(written, indices)
    if placed and same:
        return
    ours = read_png_mark(written) is not None
    if os.path.lexists(written) and not (ours or same):
        raise _in_the_way(written)
    # A call that was killed may have put the picture there in the other way, and no index map yet.
    ours = ours or (work.resumed and all(_same_content(path, pair.image) for path in there))
    if there and not (placed or ours):
        raise _in_the_way(there[0])
    work.begin()
    if there and not placed:
        # The index map goes last, as it tells that these are ours.
        for path in there:
            path.unlink()
        written.unlink(missing_ok=True)
    if not placed:
        _place(pair.image, image, copy)
    if not (same and written.exists()):
        with replacing(written) as temporary:
            Image.fromarray(indices).save(temporary, format="PNG", pnginfo=png_mark("dataset"))


def _is_placed(source: Path, target: Path, copy: bool) -> bool:
    """Check whether `target` is a link to `source`, or has its content."""
    if target.is_symlink():
        return not copy and os.readlink(target) == str(source.resolve())
    return _same_content(source, target)


def _same_content(one: Path, other: Path) -> bool:
    try:
        return content_digest(one) == content_digest(other)
    except (OSError, ValueError):  # a link that leads nowhere
        return False


def _holds(path: Path, indices: np.ndarray) -> bool:
    """Check whether a file is an index map of these values."""
    try:
        found = read_index_map(path, indices.size)
    except (OSError, ValueError):
        return False
    return found.dtype == indices.dtype and np.array_equal(found, indices)


def _in_the_way(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} was not made by `catseg-fast dataset`; choose another folder")


def _indices(path: Path, classes: int, first: int) -> np.ndarray:
    """An annotation as `FolderDataset` wants it: uint8, or uint16 for more than 255 classes."""
    values = read_index_map(path)
    indices = values.astype(np.int64) - first
    known = (indices >= 0) & (indices < classes)
    wrong = ~known & (values >= first) & (values != np.iinfo(values.dtype).max)
    if wrong.any():
        raise InputError(
            f"{path}: the annotation has value {values[wrong].max()} in {wrong.sum()} pixels, "
            f"but {classes} classes are {first}..{first + classes - 1}"
        )
    indices[~known] = ignore_label_of(classes)
    return indices.astype(np.uint8 if classes <= 255 else np.uint16)


def _place(source: Path, target: Path, copy: bool) -> None:
    with replacing(target) as temporary:
        if copy:
            with open_regular(source) as original, temporary.open("wb") as written:
                shutil.copyfileobj(original, written)
        else:
            temporary.symlink_to(source.resolve())
