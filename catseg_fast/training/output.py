"""Whose the files in a run's output folder are."""

from __future__ import annotations

import os
from pathlib import Path

from catseg_fast.training.checkpoints import is_exported
from catseg_fast.training.log import LOG, is_log
from catseg_fast.training.trainer import WEIGHTS


def check_output(folder: Path) -> None:
    """Check that a run whose results go to a folder will not replace files of others.

    Raises:
        FileExistsError: if it would.
    """
    for name, is_ours in ((WEIGHTS, is_exported), (LOG, is_log)):
        path = folder / name
        if os.path.lexists(path) and not is_ours(path):
            raise FileExistsError(f"{path} is there and is not of a run of training; choose another folder")
