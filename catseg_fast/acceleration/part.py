"""A part of a model that runs in the engine, and the cases in which its own code runs.

The model's own code answers a call

- in training, where gradients are wanted, and while a trace is made of it;
- if something of the module has changed since its code was checked: it is then checked again;
- if the call is the first of its kind: the engine computes it as well, and what differs stays with the model.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as all_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from catseg_fast.acceleration.guards import Guard
from catseg_fast.acceleration.layers import Mismatch
from catseg_fast.acceleration.swapping import base_of, own_code
from catseg_fast.engine.precision import tf32

# Kinds of calls that are remembered.
MOST_KINDS = 1024

# Number of changes between one call and the next after which a module is left alone.
MOST_CHANGES = 4

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Verdict:
    """Result of the first call of a kind: why the engine must not answer, and the answer's type."""

    reason: str | None
    dtype: torch.dtype


class Part(ABC):
    """A module's method that the engine can stand in for.

    Args:
        module: whose method it is.
        name: the module's, in the model.
        verify: whether to compare the engine's answers with the module's own.

    Attributes:
        refusal: why the module's own code runs; None if the engine does.
        when_refused: is called when a change makes the module's own code run.
    """

    method = "forward"
    kind = ""

    def __init__(self, module: nn.Module, name: str, verify: bool = True) -> None:
        self.module, self.name, self.verify = module, name, verify
        self.refusal: str | None = None
        self.verdicts: dict[object, Verdict] = {}
        self.guard: Guard | None = None
        self.when_refused: Callable[[], None] | None = None
        self._changes, self._given_up = 0, False
        self._warned: set[str] = set()

    @abstractmethod
    def read(self) -> None:
        """Get ready to run the module as it is now.

        Raises:
            Mismatch: if the engine cannot.
        """

    @abstractmethod
    def check_code(self) -> None:
        """Compare the module's code with the engine's, on a copy.

        Raises:
            Mismatch: if they differ.
        """

    @abstractmethod
    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Inputs | None:
        """Return a call's arguments as `run` takes them; None if they are not upstream's."""

    @abstractmethod
    def run(self, inputs: Inputs) -> Tensor:
        """Return the engine's answer."""

    @abstractmethod
    def compare(self, args: Sequence[Any], kwargs: dict[str, Any], inputs: Inputs) -> tuple[Any, str | None]:
        """Return the answer of a call, and why the engine's is another."""

    def settings(self) -> object:
        """Return the settings on which the engine's answer depends."""
        return None

    def watched(self) -> dict[str, nn.Module]:
        """Return the modules on which the answer depends, by name."""
        return dict(self.module.named_modules())

    def look(self) -> None:
        """Read the module and check its code; `refusal` says what is wrong with it."""
        self.verdicts.clear()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.read()
                if self.verify:
                    self.check_code()
            self.refusal = None
        except Mismatch as mismatch:
            self.refusal = str(mismatch)
        except Exception as error:  # unknown code may raise anything
            self.refusal = f"it cannot be read: {type(error).__name__}: {error}"
        self.take_guard()

    def take_guard(self) -> None:
        """Take a snapshot of the module."""
        self.device = next((x.device for x in self.module.parameters()), torch.device("cpu"))
        self.guard = Guard(self.watched(), type(self.module))

    def is_unchanged(self) -> bool:
        """Check that the module has not changed since the snapshot."""
        return self.guard is not None and self.guard.same_code() and self.guard.same_weights()

    def explain(self) -> str:
        """Return a line that says where the part runs, and why."""
        title = f"{self.name or 'the model'} ({self.kind})"
        if self.refusal is not None:
            return f"{title}: the model's own code, because {self.refusal}"
        other = sorted({v.reason for v in self.verdicts.values() if v.reason is not None})
        count = len(self.verdicts)
        kinds = "1 kind" if count == 1 else f"{count} kinds"
        checked = f"{kinds} of input compared" if self.verify else "not compared"
        tail = (
            "" if not other else f", {len(other)} of which stay with the model's own code: {'; '.join(other)}"
        )
        return f"{title}: the engine; {checked}{tail}"

    def own(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the answer of the module's own code, in which no part runs in the engine."""
        with own_code():
            return getattr(base_of(self.module), self.method)(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.bind(args, kwargs)
        if inputs is None or not self._may_run(inputs):
            return getattr(base_of(self.module), self.method)(self.module, *args, **kwargs)
        if not self.verify:
            with torch.no_grad():
                return self.run(inputs)
        kind = (_kind(inputs), _ambient(self.device), self.settings())
        verdict = self.verdicts.get(kind)
        if verdict is None:
            return self._first(kind, args, kwargs, inputs)
        if verdict.reason is not None:
            return getattr(base_of(self.module), self.method)(self.module, *args, **kwargs)
        with torch.no_grad():
            answer = self.run(inputs)
        return answer if answer.dtype is verdict.dtype else answer.to(verdict.dtype)

    def _may_run(self, inputs: Inputs) -> bool:
        if self.module.training:
            return False
        if torch.is_grad_enabled() and self._wants_gradients(inputs):
            if self.refusal is None:
                self.warn("gradients are wanted", "the model's own code runs; call under torch.no_grad()")
            return False
        if _is_observed():
            return False
        if not all(_is_plain(x) for x in inputs):
            return False
        assert self.guard is not None
        if not self._given_up:
            if self.is_unchanged():
                self._changes = 0
            else:
                self._look_again(self.guard)
                if self._changes > MOST_CHANGES:
                    return False
        if self.refusal is not None:
            return False
        if (trained := self.guard.in_training()) is not None:
            self.warn(f"{trained or 'a module'} is in training mode")
            return False
        return True

    def _look_again(self, guard: Guard) -> None:
        """Read the module once more; if more than weights has changed, check its code, too."""
        self._changes += 1
        if self.refusal is None and guard.same_code() and guard.same_names_of_tensors():
            self.verdicts.clear()
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self.read()
                guard.take_weights()
                return
            except Mismatch:
                pass
        what = guard.difference()
        self.look()
        if self._changes > MOST_CHANGES:
            self.refusal, self._given_up = f"{what}, from one call to the next", True
        if self.refusal is None:
            self.warn(what, "the code was checked again")
            return
        self.warn(what if what in self.refusal else f"{what}; {self.refusal}")
        if self.when_refused is not None:
            self.when_refused()

    def _first(self, kind: object, args: Sequence[Any], kwargs: dict[str, Any], inputs: Inputs) -> Any:
        """Answer the first call of a kind: by the module's own code, and note whether the engine agrees."""
        with torch.no_grad(), tf32(False):
            answer, reason = self.compare(args, kwargs, inputs)
        if reason is not None:
            self.warn(f"for this kind of input it computes something else ({reason})")
        if len(self.verdicts) >= MOST_KINDS:
            self.verdicts.clear()
        self.verdicts[kind] = Verdict(reason, getattr(answer, "dtype", torch.float32))
        return answer

    def _wants_gradients(self, inputs: Inputs) -> bool:
        if any(x.requires_grad for x in _tensors(inputs)):
            return True
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def warn(self, what: str, then: str = "the model's own code runs") -> None:
        """Say once why the model's own code runs."""
        message = f"model: {self.name or 'it'}: {what}; {then}"
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _kind(item: Any) -> object:
    """Return the properties of an argument that are equal in calls of one kind."""
    if isinstance(item, Tensor):
        return (item.shape, item.dtype, item.device)
    if isinstance(item, (list, tuple)):
        return tuple(map(_kind, item))
    if isinstance(item, dict):
        return tuple((key, _kind(value)) for key, value in item.items())
    return item


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (list, tuple, dict)):
        for value in item.values() if isinstance(item, dict) else item:
            yield from _tensors(value)


def _is_plain(item: Any) -> bool:
    """Check for tensors of PyTorch's own class, and numbers and names."""
    if isinstance(item, (list, tuple)):
        return all(map(_is_plain, item))
    if isinstance(item, dict):
        return all(map(_is_plain, item.values()))
    return item is None or type(item) in (Tensor, nn.Parameter, bool, int, float, str)


def _ambient(device: torch.device) -> object:
    """Return everything that an answer depends on besides the arguments."""
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return (autocast, torch.get_default_dtype(), *modes)


def _is_observed() -> bool:
    """Check whether something sees, or changes, each operation or each module of a call."""
    return bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    )
