"""Whether a picture's results are there already, and are those that would come out again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from catseg_fast.cli.inputs import Picture

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg


def fingerprint(model: CATSeg, weights: Path | None, seed: int, alpha: float) -> str:
    """A value for all that decides what is written, but for the picture.

    That is the content of the weights' file (or the seed of untrained ones), the classes and the options;
    not the device and the back end, which change rounding alone.
    """
    facts = {
        "weights": f"untrained, seed {seed}" if weights is None else _digest(weights),
        "variant": model.variant.name,
        "dtype": str(model.dtype),
        "classes": model.classes,
        "sliding_window": model.sliding_window,
        "max_classes": model.max_classes,
        "alpha": alpha,
    }
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def finished(picture: Picture, wanted: str) -> dict[str, Any] | None:
    """The content of a picture's JSON file, if its three files are whole, for this fingerprint, and not older
    than the picture; else None.
    """
    try:
        content = json.loads(picture.result("json").read_text(encoding="utf-8"))
        size = (content["width"], content["height"])
        if (content["fingerprint"], content["image"]) != (wanted, str(picture.path)):
            return None
        if picture.path.stat().st_mtime > picture.result("json").stat().st_mtime:
            return None
        for suffix in ("labels.png", "overlay.png"):
            with Image.open(picture.result(suffix)) as image:
                image.load()
                if suffix == "labels.png" and image.size != size:
                    return None
    except Exception:  # damaged files raise whatever the format's decoder stumbles over
        return None
    return content


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
