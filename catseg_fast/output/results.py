"""What the command line writes for each picture: overlay, label map, and a summary as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from catseg_fast.files import temporary_folder
from catseg_fast.identity import place_digest, place_of, png_mark, result_digest
from catseg_fast.output.formats import FORMATS, Labelled, check_formats
from catseg_fast.output.overlay import class_shares, label_png, overlay
from catseg_fast.output.ownership import FORMAT_SUFFIXES, PNG_SUFFIXES, Owner, owner_of
from catseg_fast.output.strips import row_strips

if TYPE_CHECKING:
    from catseg_fast.inference.segmentation import Segmentation


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


def summarise(segmentation: Segmentation) -> list[dict[str, Any]]:
    """Each class's index, name, share of the pixels and mean score there (None without pixels)."""
    classes, labels, scores = segmentation.classes, segmentation.labels, segmentation.scores
    shares = class_shares(labels, len(classes))
    sums = torch.zeros(len(classes), dtype=torch.float64)
    for part in row_strips(*labels.shape):
        weights = scores[part].double().flatten()
        sums += torch.bincount(labels[part].flatten(), weights=weights, minlength=len(classes))
    means = sums / (shares * labels.numel())
    rows = zip(classes, shares.tolist(), means.tolist(), strict=True)
    return [
        {"index": index, "name": name, "share": share, "mean_score": mean if share else None}
        for index, (name, share, mean) in enumerate(rows)
    ]


def save_segmentation(
    folder: Path,
    stem: str,
    image: Tensor,
    segmentation: Segmentation,
    about: Mapping[str, Any],
    alpha: float = 0.55,
    *,
    picture: Path | None = None,
    digest: str | None = None,
    formats: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Write `stem`.overlay.png, `stem`.labels.png (16 bits), files in other formats, and `stem`.json.

    The JSON file is removed first and written last. It vouches for the others by their content, so that a
    result that was interrupted is never taken for a complete one. Files of earlier results in formats that
    are not written now are removed.

    Args:
        folder: where to; it is made if need be.
        stem: how the files' names start.
        image: `[3, H, W]`, RGB in 0..255.
        segmentation: the image's.
        about: further entries at the head of the JSON file.
        alpha: share of the colours in the overlay.
        picture: the file that `image` was read from; only results of the same file are replaced.
        digest: of its content, as of `catseg_fast.identity.content_digest`.
        formats: names of other formats, of `catseg_fast.output.formats.FORMATS`.

    Returns:
        The summary of the classes in the JSON file, as of `summarise`.

    Raises:
        OSError: if writing fails; FileExistsError if a file is there that is not a result of this picture.
        InputError: if image and segmentation do not fit together, a label exceeds 16 bits, or a format is
            unknown or does not hold the classes.
        ImportError: if a format needs a package that is not installed.
    """
    check_formats(formats, len(segmentation.classes))
    summary = summarise(segmentation)
    save_labels(
        folder, stem, image, segmentation.labels, summary, about, alpha,
        picture=picture, digest=digest, formats=formats,
    )  # fmt: skip
    return summary


def save_labels(
    folder: Path,
    stem: str,
    image: Tensor | Callable[[], Tensor],
    labels: Tensor,
    summary: list[dict[str, Any]],
    about: Mapping[str, Any],
    alpha: float = 0.55,
    *,
    picture: Path | None = None,
    digest: str | None = None,
    formats: Sequence[str] = (),
) -> None:
    """`save_segmentation` of a label map and its `summarise`; scores need not be kept for it.

    Args:
        image: or a function that reads it when the label map is written.
        labels: integers `[H, W]`, indices into the classes of `summary`.
    """
    check_formats(formats, len(summary))
    height, width = labels.shape
    classes = tuple(entry["name"] for entry in summary)
    folder.mkdir(parents=True, exist_ok=True)
    mark = "" if picture is None else place_digest(picture)
    overlay_name, map_name = names = [stem + suffix for suffix in PNG_SUFFIXES]
    with temporary_folder(folder) as scratch:
        label_png(labels).save(scratch / map_name, pnginfo=png_mark(mark))
        file_name = stem if picture is None else picture.name
        labelled = Labelled(labels.numpy(), classes, file_name, mark)
        for format in dict.fromkeys(formats):
            names.append(stem + FORMATS[format].suffix)
            FORMATS[format].write(scratch / names[-1], labelled)
        painted = overlay(image() if callable(image) else image, labels, classes, alpha)
        painted.save(scratch / overlay_name, pnginfo=png_mark(mark))
        identity = {
            "path": None if picture is None else place_of(picture),
            "content": digest,
            "files": {name: result_digest(scratch / name) for name in names},
        }
        content = {**about, "identity": identity, "width": width, "height": height, "classes": summary}
        result = folder / f"{stem}.json"
        write_result(scratch / result.name, content)
        _require_ours(folder, stem, picture)
        result.unlink(missing_ok=True)
        (scratch / "replaced").mkdir()
        for name in (stem + suffix for suffix in FORMAT_SUFFIXES):
            if os.path.lexists(folder / name):  # a folder cannot be replaced, only moved away
                os.replace(folder / name, scratch / "replaced" / name)
        for name in (*names, result.name):
            os.replace(scratch / name, folder / name)


def result_paths(folder: Path, stem: str, formats: Sequence[str] = ()) -> list[Path]:
    """The paths of what `save_segmentation` writes."""
    suffixes = [*PNG_SUFFIXES, *(FORMATS[name].suffix for name in dict.fromkeys(formats)), ".json"]
    return [folder / (stem + suffix) for suffix in suffixes]


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content of a result's JSON file."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A file's name can hold bytes that are not UTF-8: lone surrogates, which JSON has escapes for.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def _require_ours(folder: Path, stem: str, picture: Path | None) -> None:
    owner = owner_of(folder, stem, picture)
    if owner is Owner.OTHER_PICTURE:
        raise FileExistsError(f"{folder / stem}.*: results of another picture than {picture}")
    if owner is Owner.STRANGER:
        names = ", ".join(stem + suffix for suffix in (*PNG_SUFFIXES, ".json", *FORMAT_SUFFIXES))
        raise FileExistsError(
            f"{folder}: one of {names} is there and is not a result of catseg-fast; it is not replaced"
        )
