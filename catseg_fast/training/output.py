"""Ownership of the files in a run's output folder."""

from __future__ import annotations

import os
from pathlib import Path

from catseg_fast.training.checkpoints import is_exported
from catseg_fast.training.log import LOG, is_log
from catseg_fast.training.trainer import WEIGHTS


def check_output(folder: Path) -> None:
    """Check that a run whose results go to a folder will not replace other files.

    Raises:
        FileExistsError: if it would.
    """
    for name, is_ours in ((WEIGHTS, is_exported), (LOG, is_log)):
        path = folder / name
        if os.path.lexists(path) and not is_ours(path):
            raise FileExistsError(
                f"{path} exists and does not belong to a training run; choose another folder"
            )
