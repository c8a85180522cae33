"""The check for pictures whose results are up to date."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from catseg_fast.cli.inputs import Picture
from catseg_fast.files import replacing, sweep
from catseg_fast.identity import content_digest, place_of, result_digest, settings_digest
from catseg_fast.output.ownership import PNG_SUFFIXES, is_result_of, read_result
from catseg_fast.output.results import write_result

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg


def fingerprint(
    model: CATSeg,
    weights: Path | None,
    seed: int,
    alpha: float,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Return a digest of everything that results depend on besides the picture.

    This is the content of the weights' file (or the seed of untrained weights), the classes, the options and
    further `settings`; not the device and the back end, which only change rounding.
    """
    facts = {
        "weights": f"untrained, seed {seed}" if weights is None else content_digest(weights),
        "variant": model.variant.name,
        "dtype": str(model.dtype),
        "classes": model.classes,
        "sliding_window": model.sliding_window,
        "max_classes": model.max_classes,
        "alpha": alpha,
    }
    if model.fold is not None:
        facts["fold"] = model.fold.by_class
    return settings_digest({**facts, **settings})


def finished(
    picture: Picture,
    expected: str,
    suffixes: Sequence[str] = PNG_SUFFIXES,
    digest_of: Callable[[Path], str] = content_digest,
) -> dict[str, Any] | None:
    """Return the content of a picture's JSON file if the results are up to date, or None.

    They are if the JSON file has the digests of the picture's present content, by `digest_of`, and of the
    result files, which include those with `suffixes`, and the fingerprint `expected`. If the picture has
    moved, the JSON file gets its new path.
    """
    path = picture.result("json")
    sweep(picture.folder)
    content = read_result(path)
    if content is None or "identity" not in content or content.get("fingerprint") != expected:
        return None
    identity = content["identity"]
    try:
        if not is_result_of(content, picture.path) or identity["content"] != digest_of(picture.path):
            return None
        for name in identity["files"].keys() | {picture.stem + suffix for suffix in suffixes}:
            if identity["files"].get(name) != result_digest(picture.folder / name):
                return None
        place = place_of(picture.path)
        if (content["image"], identity["path"]) != (str(picture.path), place):
            content |= {"image": str(picture.path), "identity": {**identity, "path": place}}
            with replacing(path) as temporary:
                write_result(temporary, content)
    except (OSError, ValueError, KeyError):  # a file is missing or unreadable
        return None
    return content
