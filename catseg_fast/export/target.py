"""The files of an exported model, without torch."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

from catseg_fast.errors import InputError, MissingPackageError
from catseg_fast.files import read_text

FORMAT = "catseg-fast onnx"  # what the card beside a model says


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path of an .onnx file that can be written.

    Raises:
        FileNotFoundError, InputError: if the path has no folder or another suffix.
        FileExistsError: if a file beside it would be replaced that is not of an earlier export.
        MissingPackageError: if onnx or onnxscript is not installed.
    """
    path = Path(path).expanduser()
    if path.suffix != ".onnx":
        raise InputError(f"path: {path} must end in .onnx")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    _require_ours(path)
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingPackageError(
                f'export: needs {package}, which is not installed: pip install "catseg-fast[export]"'
            )
    return path


def _require_ours(path: Path) -> None:
    """Check that what would be replaced beside an .onnx file was written by `export_onnx`."""
    card = path.with_suffix(".json")
    try:
        content = json.loads(read_text(card))
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and str(content.get("format")).startswith(FORMAT):
        return
    for other in (card, path.with_name(f"{path.stem}.classes.npz"), path.with_name(f"{path.name}.data")):
        if os.path.lexists(other):
            raise FileExistsError(f"path: {other} is there and is not of an export; choose another name")
