"""Classes with several names each, which compete separately and are folded afterwards.

The probability of a class is the largest of its names'. Names are in the order of their classes, so that the
class of a pixel's best name, of equal ones the first, is its best class, of equal ones the first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from catseg_fast.errors import InputError, InputTypeError, quoted, shortened
from catseg_fast.text.prompts import check_classes

# One name per class; or the names of each class, by its own name.
ClassNames: TypeAlias = Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Fold:
    """The class of each name.

    Attributes:
        classes: class names; labels are indices into them.
        names: names that compete, those of the first class first.
        owners: the index of each name's class, ascending.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    owners: tuple[int, ...]

    @classmethod
    def of(cls, classes: Mapping[str, str | Sequence[str]], argument: str = "classes") -> Fold:
        """Return the fold of the names of each class.

        Raises:
            InputTypeError: if a class's names are neither a string nor a list of strings.
            InputError: if there is no class, a class has no names, or a name belongs to two classes; the
                message begins with `argument`.
        """
        check_classes(tuple(classes), argument)
        owners: dict[str, int] = {}
        for index, (label, names) in enumerate(classes.items()):
            names = [names] if isinstance(names, str) else names
            if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
                raise InputTypeError(
                    f"{argument}: {quoted(label)} has {shortened(names)}; "
                    "expected its name or a list of its names"
                )
            if not names:
                raise InputError(
                    f"{argument}: {quoted(label)} has no names; list at least one, as [{quoted(label)}]"
                )
            check_classes(names, f"{argument}: {quoted(label)}")
            for name in names:
                if name in owners:
                    other = quoted(tuple(classes)[owners[name]])
                    raise InputError(
                        f"{argument}: {quoted(name)} is a name of {other} and of {quoted(label)}"
                    )
                owners[name] = index
        return cls(tuple(classes), tuple(owners), tuple(owners.values()))

    @property
    def by_class(self) -> dict[str, list[str]]:
        """Return the names of each class."""
        return {label: list(self.names[self.names_of(index)]) for index, label in enumerate(self.classes)}

    def names_of(self, index: int) -> slice:
        """Return the indices of a class's names."""
        return slice(bisect_left(self.owners, index), bisect_right(self.owners, index))


def split_fold(classes: ClassNames) -> tuple[Sequence[str], Fold | None]:
    """Return the names that compete, and how they are folded; None if each is a class of its own."""
    if not isinstance(classes, Mapping):
        return classes, None
    fold = Fold.of(classes)
    return fold.names, fold
