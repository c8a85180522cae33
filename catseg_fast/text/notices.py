"""Warnings to the users of the package."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """Issue a UserWarning that points to the code that called this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("catseg_fast."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
