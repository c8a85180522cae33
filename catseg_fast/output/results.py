"""What the command line writes for each picture: overlay, label map, and a summary as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from catseg_fast.output.overlay import class_shares, label_png, overlay

if TYPE_CHECKING:
    from catseg_fast.inference.segmentation import Segmentation


def unique_stems(paths: Iterable[Path]) -> list[str]:
    """A stem for each path's outputs: its own, numbered where two would meet ("photo", "photo-2")."""
    stems = [path.stem for path in paths]
    reserved = {stem.casefold() for stem in stems}  # some file systems ignore case
    taken: set[str] = set()
    unique = []
    for stem in stems:
        candidate, number = stem, 1
        while candidate.casefold() in taken or (number > 1 and candidate.casefold() in reserved):
            number += 1
            candidate = f"{stem}-{number}"
        taken.add(candidate.casefold())
        unique.append(candidate)
    return unique


def summarise(segmentation: Segmentation) -> list[dict[str, Any]]:
    """Each class's index, name, share of the pixels and mean score there (None without pixels)."""
    classes = segmentation.classes
    shares = class_shares(segmentation.labels, len(classes))
    labels, scores = segmentation.labels.flatten(), segmentation.scores.double().flatten()
    means = torch.bincount(labels, weights=scores, minlength=len(classes)) / (shares * labels.numel())
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
) -> list[dict[str, Any]]:
    """Write `stem`.overlay.png, `stem`.labels.png (16 bits) and `stem`.json: all whole, or none.

    Args:
        folder: where to; it is made if need be.
        stem: how the files' names start.
        image: `[3, H, W]`, RGB in 0..255.
        segmentation: the image's.
        about: further entries at the head of the JSON file.
        alpha: share of the colours in the overlay.

    Returns:
        The summary of the classes in the JSON file, as of `summarise`.

    Raises:
        OSError: if writing fails.
        ValueError: if image and segmentation do not fit together, or a label exceeds 16 bits.
    """
    classes = summarise(segmentation)
    height, width = segmentation.labels.shape
    content = {**about, "width": width, "height": height, "classes": classes}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".catseg-fast-") as temporary:
        scratch = Path(temporary)
        overlay(image, segmentation.labels, segmentation.classes, alpha).save(scratch / f"{stem}.overlay.png")
        label_png(segmentation.labels).save(scratch / f"{stem}.labels.png")
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (scratch / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
        for file in sorted(scratch.iterdir(), reverse=True):  # the .json, which vouches for the others, last
            os.replace(file, folder / file.name)
    return classes
