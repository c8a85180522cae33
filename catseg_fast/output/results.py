"""Files of the command line for each picture: overlay, label map, and a summary as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from catseg_fast.files import exclusive, temporary_folder
from catseg_fast.identity import place_digest, place_of, png_mark, result_digest
from catseg_fast.labels import NONE, NONE_NAME
from catseg_fast.output.formats import FORMATS, Labelled, check_formats
from catseg_fast.output.overlay import UNLABELLED_VALUE, class_shares, count_pixels, label_png, overlay
from catseg_fast.output.ownership import OTHER_SUFFIXES, PNG_SUFFIXES, Owner, owner_of
from catseg_fast.output.strips import row_strips
from catseg_fast.output.top_classes import TOP_SUFFIX, write_top_classes

if TYPE_CHECKING:
    from catseg_fast.inference.segmentation import Segmentation


def summarise(segmentation: Segmentation) -> list[dict[str, Any]]:
    """Return each class's index, name, share of the pixels and mean score there (None without pixels).

    With `min_score`, the last entry, with the index -1, is for pixels that no class fits; its mean score is
    that of their best classes.
    """
    classes, labels, scores = segmentation.classes, segmentation.labels, segmentation.scores
    shares = class_shares(labels, len(classes))
    pixels = count_pixels(labels, len(classes))
    sums = torch.zeros(len(classes) + 1, dtype=torch.float64)
    for part in row_strips(*labels.shape):
        indices, weights = labels[part].flatten().long() + 1, scores[part].double().flatten()
        sums += torch.bincount(indices, weights, len(classes) + 1)
    rows = zip(classes, shares.tolist(), (sums / pixels)[1:].tolist(), strict=True)
    summary = [
        {"index": index, "name": name, "share": share, "mean_score": mean if share else None}
        for index, (name, share, mean) in enumerate(rows)
    ]
    if segmentation.min_score is not None:
        share = pixels[0].item() / labels.numel()
        mean = (sums[0] / pixels[0]).item() if share else None
        summary.append({"index": NONE, "name": NONE_NAME, "share": share, "mean_score": mean})
    return summary


def save_segmentation(
    folder: Path,
    stem: str,
    image: Tensor | Callable[[], Tensor],
    segmentation: Segmentation,
    about: Mapping[str, Any],
    alpha: float = 0.55,
    *,
    picture: Path | None = None,
    digest: str | None = None,
    formats: Sequence[str] = (),
    present: float | None = None,
    summary: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Write `stem`.overlay.png, `stem`.labels.png (16 bits), files in other formats, and `stem`.json.

    With `top_labels`, `stem`.top.npz is also written.

    The JSON file is removed first and written last. It has digests of the other files, so that an interrupted
    result is never mistaken for a complete one. Files of earlier results in formats that are not written now
    are removed.

    Args:
        folder: folder of the files, made if necessary.
        stem: start of the files' names.
        image: `[3, H, W]`, RGB in 0..255; or a function that reads it when its turn comes.
        segmentation: the image's.
        about: further entries at the head of the JSON file.
        alpha: share of the colours in the overlay.
        picture: the file that `image` was read from; only results of the same file are replaced.
        digest: digest of its content, by `catseg_fast.identity.content_digest`.
        formats: names of other formats, of `catseg_fast.output.formats.FORMATS`.
        present: smallest share of the pixels for a class to be in the legend and the JSON file; by default,
            all classes that occur.
        summary: what `summarise` says of the segmentation, whose scores are then not looked at.

    Returns:
        The classes in the JSON file, by `summarise`.

    Raises:
        OSError: if writing fails; FileExistsError if a file is there that is not a result of this picture.
        InputError: if image and segmentation do not fit together, a label exceeds 16 bits, or a format is
            unknown or does not hold the classes.
        ImportError: if a format needs a package that is not installed.
    """
    check_formats(formats, len(segmentation.classes))
    classes = [entry for entry in summary or summarise(segmentation) if entry["share"]]
    if present is not None:
        classes = [entry for entry in classes if entry["share"] >= present or entry["index"] == NONE]
    height, width = segmentation.labels.shape
    folder.mkdir(parents=True, exist_ok=True)
    mark = "" if picture is None else place_digest(picture)
    overlay_name, map_name = names = [stem + suffix for suffix in PNG_SUFFIXES]
    with temporary_folder(folder) as scratch:
        label_png(segmentation.labels).save(scratch / map_name, pnginfo=png_mark(mark))
        pixels = image() if callable(image) else image
        painted = overlay(pixels, segmentation.labels, segmentation.classes, alpha, present=present or 0.0)
        painted.save(scratch / overlay_name, pnginfo=png_mark(mark))
        del pixels, painted
        file_name = stem if picture is None else picture.name
        labelled = Labelled(segmentation.labels.numpy(), segmentation.classes, file_name, mark)
        for format in dict.fromkeys(formats):
            names.append(stem + FORMATS[format].suffix)
            FORMATS[format].write(scratch / names[-1], labelled)
        if segmentation.top_labels is not None:
            names.append(stem + TOP_SUFFIX)
            write_top_classes(scratch / names[-1], segmentation, mark)
        identity = {
            "path": None if picture is None else place_of(picture),
            "content": digest,
            **vouched(scratch, names),
        }
        content = {**about, "identity": identity, "width": width, "height": height}
        if segmentation.min_score is not None:
            content |= {"min_score": segmentation.min_score, "unlabelled_value": UNLABELLED_VALUE}
        if present is not None:
            content["present"] = present
        content["classes"] = classes
        put_in_place(scratch, folder, stem, names, content, picture)
    return classes


def vouched(folder: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The entry of a result's "identity" that vouches for files, or folders of files, by their content."""
    return {"files": {name: result_digest(folder / name) for name in names}}


def put_in_place(
    scratch: Path,
    folder: Path,
    stem: str,
    names: Sequence[str],
    content: Mapping[str, Any],
    picture: Path | None,
) -> None:
    """Move a result's files from `scratch` to `folder`; the JSON file is removed first and written last.

    What else is there of the stem shows an earlier answer, and is removed. Of two runs at once, each puts
    all of its files in place before the other one does.

    Raises:
        FileExistsError: as of `require_ours`.
    """
    result = folder / f"{stem}.json"
    write_result(scratch / result.name, content)
    (scratch / "replaced").mkdir()
    with exclusive(folder):
        require_ours(folder, stem, picture)
        result.unlink(missing_ok=True)
        for name in (stem + suffix for suffix in (*PNG_SUFFIXES, *OTHER_SUFFIXES)):
            place = folder / name
            if name in names and not place.is_dir():
                continue
            if os.path.lexists(place):  # a folder cannot be replaced, only moved away
                os.replace(place, scratch / "replaced" / name)
        for name in (*names, result.name):
            os.replace(scratch / name, folder / name)


def result_paths(
    folder: Path, stem: str, formats: Sequence[str] = (), top_classes: bool = False
) -> list[Path]:
    """The paths of what `save_segmentation` writes; with `top_classes`, of an answer that has them."""
    suffixes = [*PNG_SUFFIXES, *(FORMATS[name].suffix for name in dict.fromkeys(formats))]
    suffixes += [*[TOP_SUFFIX] * top_classes, ".json"]
    return [folder / (stem + suffix) for suffix in suffixes]


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content of a result's JSON file."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A file's name can hold bytes that are not UTF-8: lone surrogates, which JSON has escapes for.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def require_ours(folder: Path, stem: str, picture: Path | None) -> None:
    """Check that results of a picture may go into the files of a stem, as of `owner_of`.

    Raises:
        FileExistsError: if one of these is not a result of this picture.
    """
    owner = owner_of(folder, stem, picture)
    if owner is Owner.OTHER_PICTURE:
        raise FileExistsError(f"{folder / stem}.*: results of another picture than {picture}")
    if owner is Owner.STRANGER:
        suffixes = (*PNG_SUFFIXES, ".json", *OTHER_SUFFIXES)
        names = ", ".join(stem + suffix for suffix in suffixes)
        raise FileExistsError(
            f"{folder}: one of {names} exists and is not a result of catseg-fast; it is not replaced"
        )
