"""Classes that a model cannot tell apart, because their prompts have the same tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import gcd

from catseg_fast.config import Version
from catseg_fast.errors import quoted
from catseg_fast.text.notices import warn
from catseg_fast.text.tokens import tokenize_classes

LISTED = 20


def warn_of_same_prompts(
    classes: Sequence[str], templates: Sequence[str], version: Version, context_length: int
) -> None:
    """Warn of classes that are never the best one, because an earlier class has the same prompts."""
    groups = same_prompts(classes, templates, version, context_length)
    if not groups:
        return
    pairs = [
        f"{quoted(classes[index], 60)} ({index}) as {quoted(classes[first], 60)} ({first})"
        for first, *others in groups
        for index in others
    ]
    more = f", and {len(pairs) - LISTED} more" if len(pairs) > LISTED else ""
    first_synonym = ", of which this model reads the first synonym only" if version == "v2" else ""
    number = "1 class is" if len(pairs) == 1 else f"{len(pairs)} classes are"
    warn(
        f"classes: {number} never labelled, since their prompts have the same tokens as an earlier class's"
        f"{first_synonym}: {', '.join(pairs[:LISTED])}{more}"
    )


def same_prompts(
    classes: Sequence[str], templates: Sequence[str], version: Version, context_length: int = 77
) -> list[list[int]]:
    """Return the indices of classes with the same prompts, for each group of two or more.

    Case, white space and the order of synonyms do not count. Templates are the same for all classes, so that
    comparing one suffices.
    """
    groups: dict[tuple[tuple[bytes, int], ...], list[int]] = {}
    for index, tokens in enumerate(tokenize_classes(classes, templates[:1], version, context_length)):
        counts = Counter(row.tobytes() for row in tokens.numpy())
        divisor = gcd(*counts.values())  # "sky, sky" has the mean of "sky"
        key = tuple(sorted((row, count // divisor) for row, count in counts.items()))
        groups.setdefault(key, []).append(index)
    return [group for group in groups.values() if len(group) > 1]
