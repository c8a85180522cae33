"""The files of an exported model, without torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from catseg_fast.errors import InputError, MissingPackageError


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path of an .onnx file that can be written.

    Raises:
        FileNotFoundError, InputError: if the path has no folder or another suffix.
        MissingPackageError: if onnx or onnxscript is not installed.
    """
    path = Path(path).expanduser()
    if path.suffix != ".onnx":
        raise InputError(f"path: {path} must end in .onnx")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingPackageError(
                f'export: needs {package}, which is not installed: pip install "catseg-fast[export]"'
            )
    return path
