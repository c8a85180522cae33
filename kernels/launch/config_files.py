"""Files of launch configs that were measured on a GPU: where they are, and their entries.

They are JSON files, one per GPU and op, `<gpu>/<op>.json`: lists of entries such as

    {"kernel": "mlp", "dtype": "fp16", "precision": "ieee",
     "shape": {"positions": 576, "channels": 128, "hidden": 512, "crop_classes": 255},
     "config": {"rows": 128, "hidden": 64, "num_warps": 8, "num_stages": 2},
     "gpu": "NVIDIA H200", "capability": 90, "multiprocessors": 132, …}
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[2] / "configs"
FREE_SIZE = "crop_classes"


def user_folder() -> Path:
    """Return the folder that `catseg-fast tune` writes to: `catseg-fast/configs` in `$XDG_CACHE_HOME`.

    Without the variable, it is in `~/.cache`.

    Raises:
        RuntimeError: if the variable is not set and the user has no home folder.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache_home.is_absolute():  # which the XDG specification says to ignore
        cache_home = Path.home() / ".cache"
    return cache_home / "catseg-fast" / "configs"


def config_path(folder: Path, gpu: str, op: str) -> Path:
    """Return an op's file for a GPU, in a folder named after it: `nvidia-h200` for "NVIDIA H200"."""
    return folder / slug(gpu) / f"{op}.json"


def read(path: Path, gpu: str) -> list[dict[str, Any]]:
    """Return the entries of a GPU's file; damaged ones and those of other GPUs are skipped with a warning.

    A missing file has no entries, and causes no warning.
    """
    try:
        entries = _parse(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        warn(path, error)
        return []
    faults = [_fault(entry, gpu) for entry in entries]
    if found := [f"entry {number} {fault}" for number, fault in enumerate(faults) if fault]:
        warn(path, ValueError(f"{len(found)} of {len(entries)} entries: {found[0]}"))
    return [entry for entry, fault in zip(entries, faults, strict=True) if not fault]


def _parse(content: bytes) -> list[Any]:
    """Return the entries in a file; in a damaged file, each line is read separately, or is None.

    Raises:
        ValueError, RecursionError: if the content is not a list, or no line can be read.
    """
    try:
        entries = json.loads(content.decode("utf-8"))
    except ValueError:
        lines = (line.strip().removesuffix(b",") for line in content.splitlines())
        entries = [_parse_line(line) for line in lines if line not in (b"", b"[", b"]")]
        if not any(isinstance(entry, dict) for entry in entries):
            raise
    if not isinstance(entries, list):
        raise ValueError("it is not a list of entries")
    return entries


def _parse_line(line: bytes) -> Any:
    """Return the value in a line; None if it is damaged."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _fault(entry: Any, gpu: str) -> str | None:
    """Return why something is not an entry of a GPU; None if it is one."""
    if not isinstance(entry, dict):
        return "is not an object"
    lacking = {"kernel", "dtype", "precision", "shape", "config", "gpu"} - entry.keys()
    if lacking:
        return f"lacks {', '.join(sorted(lacking))}"
    if not isinstance(entry["shape"], dict) or not isinstance(entry["config"], dict):
        return "has a shape or config that is not an object"
    crop_classes = entry["shape"].get(FREE_SIZE)
    if not isinstance(crop_classes, int) or crop_classes < 1:
        return f"has a {FREE_SIZE} that is not a positive integer: {crop_classes!r}"
    if slug(str(entry["gpu"])) != slug(gpu):
        return f"is for another GPU, {entry['gpu']!r}, not for {gpu!r}"
    return None


def slug(name: str) -> str:
    """Return a GPU's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def warn(path: Path | str, error: Exception) -> None:
    """Warn that a file or folder is not used."""
    warnings.warn(f"{path}: not used: {error}", stacklevel=2)
