"""Checkpoints of a run: written whole or not at all; the last two are kept."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from catseg_fast._version import __version__
from catseg_fast.checkpoints.torch_file import read_torch_file
from catseg_fast.checkpoints.write import write_torch_file, write_weights
from catseg_fast.errors import InputError
from catseg_fast.files import open_regular

KEPT = 2
TRAINING = "catseg-fast train"  # in the weights' metadata


class Checkpoints:
    """The checkpoints `step-00001000.pt` in a folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps after which there is a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)\.pt", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        return self.folder / f"step-{step:08}.pt"

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write a checkpoint, and only then remove the oldest.

        Raises:
            OSError: if it cannot be written, for example because the disk is full; earlier checkpoints
                remain.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        write_torch_file(path, content)
        self.prune()
        return path

    def prune(self) -> None:
        """Remove all but the last checkpoints; a run that was killed may have left one more."""
        for old in self.steps()[:-KEPT]:
            self.path(old).unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Return the last checkpoint that can be read, on the CPU; None if there is none.

        Raises:
            InputError: if all checkpoints are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                with open_regular(path) as file:
                    content = read_torch_file(file, path, mapped=False, verify=True)
                if type(content) is not dict:
                    raise InputError(f"expected a dictionary, got a {type(content).__name__}")
                return content
            except (OSError, ValueError) as error:
                warnings.warn(f"{path} is damaged: {error}", RuntimeWarning, stacklevel=2)
        if steps:
            raise InputError(f"{self.folder}: every checkpoint is damaged")
        return None

    def clear(self) -> None:
        """Remove all checkpoints."""
        for step in self.steps():
            self.path(step).unlink()


def is_exported(path: Path) -> bool:
    """Check whether a file is one that `export` has written."""
    try:
        with safe_open(path, "pt") as file:
            return bool((file.metadata() or {}).get("written_by") == TRAINING)
    except (OSError, SafetensorError):
        return False


def export(state_dict: Mapping[str, Tensor], path: Path, dtype: torch.dtype, variant: str) -> None:
    """Write weights as safetensors under upstream's keys, with floating-point numbers in `dtype`.

    Raises:
        OSError: if the file cannot be written.
    """
    tensors = {
        key: value.to("cpu", dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
        for key, value in state_dict.items()
    }
    metadata = {"format": "pt", "variant": variant, "catseg_fast": __version__, "written_by": TRAINING}
    write_weights(path, tensors, metadata)
