"""Giving one module methods of its own, through a subclass of its class, and taking them away again.

The subclass has the name and the module of the class that it stands for. Copies and pickles are of that
class: they run the model's own code. So do replicas, which share their original's attributes, but are others.
"""

from __future__ import annotations

import copyreg
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import new_class
from typing import Any

import torch
from torch import nn

from catseg_fast.acceleration.guards import PART
from catseg_fast.acceleration.layers import Mismatch

METHODS = ("forward", "conv_decoder")

_BASE = "_catseg_fast_base"


class _State(threading.local):
    own_code = 0


_state = _State()


@contextmanager
def own_code() -> Iterator[None]:
    """Let every module run its own code, in this thread."""
    _state.own_code += 1
    try:
        yield
    finally:
        _state.own_code -= 1


def install(module: nn.Module, method: str, part: Callable[..., Any]) -> None:
    """Let `part(...)` be called in place of a module's method.

    Raises:
        Mismatch: if the module's class allows no subclass.
    """
    if not is_accelerated(module):
        try:
            module.__class__ = _subclass(type(module))  # type: ignore[arg-type]
        except TypeError as error:
            raise Mismatch(f"its class {type(module).__name__} cannot be derived from: {error}") from error
    vars(module).setdefault(PART, {})[method] = part


def uninstall(module: nn.Module, method: str, part: Callable[..., Any]) -> None:
    """Give a module its method back; nothing happens if another part is installed, or none."""
    parts = vars(module).get(PART, {})
    if parts.get(method) is not part:
        return
    del parts[method]
    if parts:
        return
    del vars(module)[PART]
    if _BASE in vars(type(module)):  # else it has another class by now
        module.__class__ = base_of(module)


def installed(module: nn.Module, method: str) -> Callable[..., Any] | None:
    """Return what is called in place of a module's method."""
    part: Callable[..., Any] | None = vars(module).get(PART, {}).get(method)
    return part


def is_accelerated(module: nn.Module) -> bool:
    """Check whether a module has a part installed."""
    return PART in vars(module)


def base_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class without what was installed."""
    for kind in type(module).__mro__:  # the first may be a class that something else derived from ours
        if _BASE in vars(kind):
            base: type[nn.Module] = vars(kind)[_BASE]
            return base
    return type(module)


@functools.cache
def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    methods = {name: _dispatcher(base, name) for name in METHODS if callable(getattr(base, name, None))}

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (object.__new__, (base, *reduced[1][1:]), *map(_without_part, reduced[2:]))

    namespace = {**names, **methods, "__reduce_ex__": reduce, _BASE: base}
    return new_class(base.__name__, (base,), {}, lambda body: body.update(namespace))


def _dispatcher(base: type[nn.Module], method: str) -> Callable[..., Any]:
    def run(self: nn.Module, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _state.own_code:
            return getattr(base, method)(self, *args, **kwargs)
        return part(*args, **kwargs)

    # What a part looks at before each call cannot be compiled, nor left out.
    run_uncompiled = torch.compiler.disable(run, reason="accelerate() compares and watches the model")

    @functools.wraps(getattr(base, method))
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        part = self.__dict__.get(PART, {}).get(method)
        if part is None or part.module is not self:
            return getattr(base, method)(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            return run(self, part, *args, **kwargs)
        if self.training:
            return getattr(base, method)(self, *args, **kwargs)
        return run_uncompiled(self, part, *args, **kwargs)

    return call


def _without_part(state: Any) -> Any:
    if isinstance(state, dict) and PART in state:
        return {key: value for key, value in state.items() if key != PART}
    return state
