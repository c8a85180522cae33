"""Errors that a caller can cause and fix. Any other exception is a bug of this package.

Each also derives from the built-in exception that Python programs expect, so `except ValueError` works.
"""

from __future__ import annotations

import reprlib


class CATSegError(Exception):
    """Base of the errors that a caller can cause and fix; the message says how."""


class InputError(CATSegError, ValueError):
    """An argument, a setting or a file has a value that cannot be used."""


class InputTypeError(CATSegError, TypeError):
    """An argument has a type that cannot be used."""


class RunError(CATSegError, RuntimeError):
    """A call cannot run or continue on this machine or with the present settings."""


class MissingPackageError(CATSegError, ImportError):
    """An optional package is not installed; the message has the command that installs it."""


def quoted(text: str, most: int = 500) -> str:
    """Return a text in quotes for a message, cut if it has more characters than `most`."""
    return repr(text) if len(text) <= most else f"{text[: most // 2]!r}… ({len(text)} characters)"


def shortened(value: object) -> str:
    """Return the `repr` of any value for a message, cut if it is long."""
    try:
        return reprlib.repr(value)
    except Exception:  # of a class's own, or an integer of thousands of digits
        return f"<{type(value).__name__}>"
