"""Checks of numbers and flags that users pass, of Python and numpy; errors name the argument."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from catseg_fast.errors import InputError, InputTypeError, shortened


def whole(value: Any, name: str, least: int | None = 1) -> int:
    """Return a whole number after a check.

    Raises:
        InputTypeError: if it is not an integer of Python or numpy; a bool is none.
        InputError: if it is less than `least`, unless that is None.
    """
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputTypeError(f"{name}: expected a whole number, got {shortened(value)}")
    if least is not None and number < least:
        expected = "positive" if least == 1 else f"at least {least}"
        raise InputError(f"{name}: {shortened(number)} is not {expected}")
    return number


def real(value: Any, name: str) -> float:
    """Return a real number, which may be infinite or NaN, after a check.

    Raises:
        InputTypeError: if it is not a number of Python or numpy; a bool is none.
    """
    if _is_bool(value) or not isinstance(value, Real):
        raise InputTypeError(f"{name}: expected a number, got {shortened(value)}")
    try:
        return float(value)
    except OverflowError:  # of a large integer
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def flag(value: Any, name: str) -> bool:
    """Return True or False after a check: of other values, such as "False", the truth is not what it seems.

    Raises:
        InputTypeError: if it is neither a bool of Python nor of numpy.
    """
    if not _is_bool(value):
        raise InputTypeError(f"{name}: expected True or False, got {shortened(value)}")
    return bool(value)


def share(value: Any, name: str) -> float:
    """Return a number in 0..1 after a check.

    Raises:
        InputTypeError: if it is not a number of Python or numpy; a bool is none.
        InputError: if it is not in 0..1.
    """
    number = real(value, name)
    if not 0 <= number <= 1:
        raise InputError(f"{name}: expected a number in 0..1, got {shortened(value)}")
    return number


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's
