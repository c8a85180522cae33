"""Detection of changes to modules, in a few microseconds per call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from catseg_fast.acceleration.global_names import GlobalNames
from catseg_fast.acceleration.layers import WEIGHT_HOOKS
from catseg_fast.acceleration.samples import Samples

TENSORS = ("_parameters", "_buffers")
TABLES = ("_modules", "_forward_pre_hooks", "_forward_hooks")

PART = "_catseg_fast_part"  # the attribute that acceleration itself adds

# What every module has and is not watched, or is watched by other means; the last is torch.compile's.
UNWATCHED = frozenset(vars(nn.Module())) | {PART, "_is_torch_compile"}

# What computes the same in training and in evaluation.
STEADY = frozenset(
    {
        nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.GroupNorm, nn.AvgPool2d, nn.GELU, nn.ReLU,
        nn.Softmax, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict,
    }
)  # fmt: skip

# Values that are not looked into, and how many others are at most.
FIXED = (
    type, nn.Module, Tensor, FunctionType, MethodType, BuiltinFunctionType, ModuleType, torch.dtype,
    torch.device, str, bytes, int, float, complex, type(None),
)  # fmt: skip
MOST_VALUES = 1000

_version = attrgetter("_version")
_training = itemgetter("training")


class Guard:
    """A snapshot of modules: their classes, attributes, hooks and children, and the tensors that they hold.

    Each call compares whole lists, which is done in C.

    Args:
        modules: by name; hooks on the one whose name is empty are not watched.
        classes: further classes that are watched.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *classes: type) -> None:
        self._modules, self._further = dict(modules), classes
        every = list(modules.values())
        self._dicts = [vars(module) for module in every]
        self._lengths = list(map(len, self._dicts))
        self._types = list(map(type, every))
        kinds = dict.fromkeys(kind for t in (*self._types, *classes) for kind in t.__mro__)
        self._names = list(map(_watched, every))
        watched = [(v, key) for v, keys in zip(self._dicts, self._names, strict=True) for key in keys]
        self._loose = [(values, key, x) for values, key in watched if isinstance(x := values[key], Tensor)]
        self._keys = [
            [key for key in keys if not isinstance(values[key], Tensor)]
            for values, keys in zip(self._dicts, self._names, strict=True)
        ]
        self._getters = [
            (itemgetter(*keys), values) for keys, values in zip(self._keys, self._dicts, strict=True) if keys
        ]
        self._values = [get(values) for get, values in self._getters]
        attributes = [vars(m)[key] for m, keys in zip(every, self._keys, strict=True) for key in keys]
        self._inside = list(_containers(attributes))
        self._pictures = list(map(_copied, self._inside))
        self._globals = GlobalNames([*filter(_is_own, kinds), *filter(callable, attributes)])
        self._classes = [k for k in {**kinds, **self._globals.classes} if k not in (object, nn.Module)]
        self._class_views = [vars(kind) for kind in self._classes]
        self._class_dicts = [dict(view) for view in self._class_views]
        inside = (c.values() if isinstance(c, dict) else c for c in self._inside)
        hidden = chain(chain.from_iterable(inside), self._globals.contents())
        self._hidden = [x for x in hidden if isinstance(x, Tensor)]
        modal = (vars(module) for module in every if type(module) not in STEADY)
        self._modal = [values for values in modal if "training" in values]
        inner = [vars(module) for name, module in modules.items() if name]
        self._empty, self._filled, self._contents = _tables(inner, TABLES)
        if "" in modules:  # hooks on the module itself are called around whatever it computes
            found = _tables([vars(modules[""])], TABLES[:1])
            self._empty += found[0]
            self._filled += found[1]
            self._contents += found[2]
        self.take_weights()

    def take_weights(self) -> None:
        """Take a new snapshot of the tensors."""
        self._no_tensors, self._tables, self._held = _tables(self._dicts, TENSORS)
        self._objects = [x for table in self._tables for x in table.values()]
        self._tensors = [x for x in self._objects if x is not None]
        self._tensors += [x for _, _, x in self._loose]
        self._tensors += self._hidden
        self._tracked = [x for x in self._tensors if not x.is_inference()]
        self._versions = sum(map(_version, self._tracked))  # these counters never decrease
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._samples = Samples(self._tensors)

    def same_code(self) -> bool:
        """Check classes, attributes, hooks and children, and what the code refers to."""
        try:
            return (
                (list(map(len, self._dicts)) == self._lengths or self._same_names())
                and list(map(type, self._modules.values())) == self._types
                and not any(self._empty)
                and self._filled == self._contents
                and [get(values) for get, values in self._getters] == self._values
                and self._inside == self._pictures
                and self._class_views == self._class_dicts
                and self._globals.same()
                and all(values[key] is x for values, key, x in self._loose)
            )
        except (KeyError, RuntimeError, ValueError, TypeError):  # an attribute is gone, or is another tensor
            return False

    def _same_names(self) -> bool:
        """Check that modules have no other attributes but those that are not watched."""
        if list(map(_watched, self._modules.values())) != self._names:
            return False
        self._lengths = list(map(len, self._dicts))
        return True

    def same_weights(self) -> bool:
        """Check that the tensors are the same ones, not written to."""
        try:
            return (
                not any(self._no_tensors)
                and all(map(is_, chain.from_iterable(map(dict.values, self._tables)), self._objects))
                and sum(map(len, self._tables)) == len(self._objects)
                and sum(map(_version, self._tracked)) == self._versions
                and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
                and self._samples.same()
            )
        except (RuntimeError, ValueError):  # a tensor was replaced
            return False

    def same_names_of_tensors(self) -> bool:
        """Check that no parameter or buffer was added, removed, or set to None; they may be others."""
        names = [_names(table) for table in self._tables] == [_names(table) for table in self._held]
        return names and not any(self._no_tensors)

    def in_training(self) -> str | None:
        """Return the name of a module that is in training mode, where that may matter."""
        if not any(map(_training, self._modal)):
            return None
        modal = {id(values) for values in self._modal}
        return next(name for name, m in self._modules.items() if m.training and id(vars(m)) in modal)

    def difference(self) -> str:
        """Return what has changed; slow, for messages."""
        fresh = Guard(self._modules, *self._further)
        for name, kind, other in zip(self._modules, self._types, fresh._types, strict=True):
            if kind is not other:
                return f"{_called(name)} is now a {other.__name__}"
        for name, before, now in zip(self._modules, self._rows(), fresh._rows(), strict=True):
            for key in {**before, **now}:
                if key not in before or key not in now or not _equal(before[key], now[key]):
                    return _change(name, key, before.get(key), now.get(key))
        for kind, view, content in zip(self._classes, self._class_views, self._class_dicts, strict=True):
            if view != content:
                return f"the class {kind.__name__} has changed"
        if (changed := self._globals.difference()) is not None:
            return changed
        if self._inside != self._pictures:
            return "an attribute's content has changed"
        return "the weights have changed"

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Return the state of each module at the time of the check."""
        copies = {id(table): copy for table, copy in zip(self._filled, self._contents, strict=True)}
        copies |= {id(table): copy for table, copy in zip(self._tables, self._held, strict=True)}
        values = {id(owner): value for (_, owner), value in zip(self._getters, self._values, strict=True)}
        for keys, owner in zip(self._keys, self._dicts, strict=True):
            found = values.get(id(owner), ())
            row = dict(zip(keys, found if len(keys) > 1 else (found,), strict=False)) if keys else {}
            yield row | {key: copies.get(id(owner[key]), {}) for key in (*TABLES, *TENSORS)}


def _watched(module: nn.Module) -> list[str]:
    """Names of the attributes that a module's class, or the user, gave it."""
    computed = {
        getattr(hook, "name", getattr(hook, "_tensor_name", None))
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, WEIGHT_HOOKS)
    }
    return [key for key in vars(module) if key not in UNWATCHED and key not in computed]


def _tables(dicts: list[dict[str, Any]], names: tuple[str, ...]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return tables that are empty, those that are not, and copies of these."""
    tables = [values[name] for values in dicts for name in names]
    filled = [table for table in tables if table]
    return [table for table in tables if not table], filled, [table.copy() for table in filled]


def _is_own(kind: type) -> bool:
    return kind is not object and not kind.__module__.startswith("torch.")


def _is_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "numpy", "logging", "threading")


def _containers(values: Iterable[Any]) -> Iterator[list[Any] | dict[Any, Any] | set[Any]]:
    """Return all that may be written to in values: containers, and the attributes of objects."""
    waiting, seen = list(values), set[int]()
    while waiting and len(seen) < MOST_VALUES:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, FIXED):
            continue
        seen.add(id(value))
        if isinstance(value, (tuple, frozenset)):
            waiting += value
            continue
        found = [value] if isinstance(value, (list, dict, set)) else []
        if isinstance(getattr(value, "__dict__", None), dict) and not _is_library(type(value)):
            found.append(vars(value))
        for container in found:
            yield container
            waiting += container.values() if isinstance(container, dict) else container


def _copied(container: list[Any] | dict[Any, Any] | set[Any]) -> list[Any] | dict[Any, Any] | set[Any]:
    kind = next(kind for kind in (list, dict, set) if isinstance(container, kind))
    copied: list[Any] | dict[Any, Any] | set[Any] = kind(container)
    return copied


def _names(table: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return [(name, value is None) for name, value in table.items()]


def _equal(before: Any, now: Any) -> bool:
    try:
        return bool(before is now or before == now)
    except (RuntimeError, ValueError, TypeError):
        return False


def _change(name: str, key: str, before: Any, now: Any) -> str:
    if key in (*TABLES, *TENSORS):
        table = now or {}
        what = next((k for k in {**before, **table} if before.get(k) is not table.get(k)), "")
        verb = "replaced" if what in before and what in table else "added" if what in table else "removed"
        if "hooks" not in key:
            return f"{'.'.join(filter(None, (name, str(what))))} was {verb}"
        kind = "forward pre-hook" if "pre" in key else "forward hook"
        return f"a {kind} of {_called(name)} was {verb}"
    where = f"{name}.{key}" if name else key
    if all(isinstance(value, (int, float, str, tuple, type(None))) for value in (before, now)):
        return f"{where} is now {now!r}, was {before!r}"
    return f"{where} was changed"


def _called(name: str) -> str:
    return name or "the module itself"
