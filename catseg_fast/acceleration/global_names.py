"""Snapshots of the functions, classes and constants of modules that code refers to.

A function that is replaced in a module, or changed in place as a reloader does, changes what a forward
computes, though no class and no `nn.Module` is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial, partialmethod
from operator import attrgetter, itemgetter
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

_code = attrgetter("__code__")
_content = attrgetter("cell_contents")


class GlobalNames:
    """A snapshot of all names that some code looks up in modules and closures.

    Functions and classes are followed if they are of a package that the code itself is from.

    Args:
        owners: classes and functions.

    Attributes:
        classes: all classes that are followed; it is for the caller to watch their content.
    """

    def __init__(self, owners: Iterable[object]) -> None:
        owners = list(owners)
        self.classes: dict[type, None] = {}
        self._packages = set(map(_package, owners)) - {"torch", "builtins"}
        self._names: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}  # by the id of a module's dict
        self._functions: dict[FunctionType, None] = {}
        for owner in owners:
            self._follow(owner)
        self._getters = [(itemgetter(*names), values) for values, names in self._names.values()]
        self._values = [get(values) for get, values in self._getters]
        self._codes = list(map(_code, self._functions))
        self._cells = [cell for f in self._functions for cell in f.__closure__ or () if _is_filled(cell)]
        self._contents = list(map(_content, self._cells))

    def same(self) -> bool:
        """Check that all is as it was; may raise an error if not."""
        return (
            [get(values) for get, values in self._getters] == self._values
            and list(map(_code, self._functions)) == self._codes
            and list(map(_content, self._cells)) == self._contents
        )

    def contents(self) -> Iterator[Any]:
        """Return all values."""
        for values, names in self._names.values():
            yield from map(values.get, names)
        yield from self._contents

    def difference(self) -> str | None:
        """Return what has changed; None if nothing has."""
        pairs = zip(self._names.values(), self._values, strict=True)
        for (values, names), before in pairs:
            for name, value in zip(names, before if len(names) > 1 else (before,), strict=True):
                if values.get(name) is not value:
                    return f"{values.get('__name__', 'a module')}.{name} has changed"
        for function, code in zip(self._functions, self._codes, strict=True):
            if function.__code__ is not code:
                return f"the code of {function.__module__}.{function.__qualname__} has changed"
        for cell, content in zip(self._cells, self._contents, strict=True):
            if cell.cell_contents is not content:
                return "a variable of an enclosing function has changed"
        return None

    def _follow(self, item: object) -> None:
        functions = list(_functions(item))
        if functions:
            self._follow_all(functions)
            return
        kind = item if isinstance(item, type) else type(item)  # whose methods may be called
        if kind not in self.classes and _package(kind) in self._packages:
            self.classes[kind] = None
            for name, value in vars(kind).items():
                if name != "__init__":
                    self._follow_all(_functions(value))

    def _follow_all(self, functions: Iterable[FunctionType]) -> None:
        for function in functions:
            if function in self._functions:
                continue
            self._functions[function] = None
            for cell in function.__closure__ or ():
                if _is_filled(cell):
                    self._follow_own(cell.cell_contents)
            self._look_up(function.__globals__, set(_names_in(function.__code__)))

    def _look_up(self, values: dict[str, Any], names: set[str], *outer: dict[str, Any]) -> None:
        for name in sorted(names & values.keys()):
            value = values[name]
            fresh = name not in self._names.setdefault(id(values), (values, {}))[1]
            self._names[id(values)][1][name] = None
            if isinstance(value, ModuleType):  # whose attributes the code may use
                if not any(vars(value) is other for other in (values, *outer)):
                    self._look_up(vars(value), names, values, *outer)
            elif fresh:
                self._follow_own(value)

    def _follow_own(self, item: object) -> None:
        if _package(item) in self._packages:
            self._follow(item)


def _package(item: object) -> str:
    found = item if isinstance(item, (type, FunctionType)) else type(item)
    return (found.__module__ or "").partition(".")[0]


def _functions(item: object) -> Iterator[FunctionType]:
    """The functions in a class's attribute, or in an object that can be called."""
    if isinstance(item, FunctionType):
        yield item
    elif isinstance(item, (staticmethod, classmethod, MethodType)):
        yield from _functions(item.__func__)
    elif isinstance(item, property):
        yield from _functions(item.fget)
    elif isinstance(item, (partial, partialmethod)):
        for part in (item.func, *item.args, *item.keywords.values()):
            yield from _functions(part)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
