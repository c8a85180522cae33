"""Put the engine into a model that was built elsewhere, such as with upstream's own code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import nn
from typing_extensions import Self

from catseg_fast.acceleration.adapted import AdaptedAggregator
from catseg_fast.acceleration.adapters import Adapter
from catseg_fast.acceleration.finding import find_aggregators, nearest_candidate
from catseg_fast.acceleration.layers import Mismatch
from catseg_fast.acceleration.part import Part
from catseg_fast.acceleration.pieces import find_pieces
from catseg_fast.acceleration.swapping import install, installed, is_accelerated, uninstall
from catseg_fast.acceleration.whole import WholeAggregator
from catseg_fast.aggregator import Aggregator
from catseg_fast.backend import check_backend, choose_backend
from catseg_fast.engine.engine import Engine
from catseg_fast.errors import InputError, InputTypeError


class Acceleration:
    """Modules that run in the engine, until `restore` (or the end of a `with` block).

    Attributes:
        engines: of the aggregators that run as a whole, by their name in the model; they have the settings
            for memory and precision.
        parts: all that runs, or could run, in the engine.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    @property
    def engines(self) -> dict[str, Engine]:
        return {part.name: part.engine for part in self.parts if isinstance(part, WholeAggregator)}

    def add(self, parts: list[Part]) -> None:
        """Let further parts run in the engine, unless they are refused."""
        unchanged = [part for part in self.parts if part.is_unchanged()]
        for part in parts:
            if installed(part.module, part.method) is not None:
                part.refusal = "it has an engine already"
            elif part.refusal is None:
                try:
                    install(part.module, part.method, part)
                except Mismatch as mismatch:
                    part.refusal = str(mismatch)
        self.parts += parts
        for part in (*unchanged, *parts):  # whose modules may have other classes now
            part.take_guard()

    def explain(self) -> str:
        """Return a list of what runs where, and why."""
        return "\n".join(part.explain() for part in self.parts)

    def restore(self) -> None:
        """Give the model its own code back; a second call does nothing."""
        for part in self.parts:
            uninstall(part.module, part.method, part)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def accelerate(
    model: nn.Module,
    *,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    verify: bool = True,
    adapters: Mapping[type[nn.Module], Adapter] | None = None,
) -> Acceleration:
    """Let the aggregators in a model run in the engine; they keep their parameters and their arguments.

    Aggregators are found by their structure. If an aggregator as a whole computes something different from
    upstream's, those of its window blocks, class layers and decoder that are upstream's run in the engine.

    Nothing is guessed. The model's code is compared with the engine's on a copy; the first call of each kind
    (shapes, types) is computed by both; and later changes, such as to weights, hooks, attributes or
    submodules, are noticed. Where the answers differ, the model's own code runs, with a warning that says
    why. It also runs, without a warning, in training mode and if gradients are required.

    Args:
        model: an aggregator built like upstream's, or any model that holds one.
        backend: "auto", "triton" or "torch".
        memory_budget: bytes (or "2GiB") that a call may take; by default, the free memory.
        verify: compare the engine's answers with the model's own, at once and at the first call of each kind.
        adapters: by class of aggregator, how its calls map to upstream's.

    Raises:
        InputError: a ValueError that starts with "model:", if nothing in it can run in the engine, or
            some part already has an engine; the message says what differs. The model is then unchanged.
        RuntimeError: if the back end cannot run.
    """
    if check_backend(backend) == "reference":
        raise InputError("backend: 'reference' is no engine; the model has its own code")
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("model: it is traced or scripted by torch.jit; accelerate the original model")
    acceleration, refusals = Acceleration([]), []
    try:
        for name, aggregator in find_aggregators(model):
            _check_untouched(aggregator, name)
            adapter = _adapter_of(aggregator, adapters or {})
            whole = (
                WholeAggregator(aggregator, name, verify)
                if adapter is None
                else AdaptedAggregator(aggregator, name, adapter, verify)
            )
            whole.engine.memory_budget, whole.engine.backend = memory_budget, backend
            choose_backend(backend, next(aggregator.parameters()).device)
            whole.look()
            pieces = _Pieces(acceleration, aggregator, name, backend, verify)
            if whole.refusal is None:
                whole.when_refused = pieces.add
                acceleration.add([whole])
            else:
                refusals.append(f"{name or 'it'} is not upstream's Aggregator: {whole.refusal}")
                pieces.add()
        if not acceleration.parts and not refusals:
            _Pieces(acceleration, model, "", backend, verify).add()
        if not any(part.refusal is None for part in acceleration.parts):
            refusals += [f"{part.name}: {part.refusal}" for part in acceleration.parts]
            raise InputError(f"model: {_why_nothing(model, refusals)}")
    except BaseException:
        acceleration.restore()
        raise
    if refusals:
        count = sum(part.refusal is None for part in acceleration.parts)
        warnings.warn(
            f"model: {'; '.join(refusals)}; {count} of its parts run in the engine (`explain()` lists them)",
            RuntimeWarning,
            stacklevel=2,
        )
    return acceleration


class _Pieces:
    """The parts of an aggregator, or of a module with such parts, each found once."""

    def __init__(
        self, acceleration: Acceleration, module: nn.Module, name: str, backend: str, verify: bool
    ) -> None:
        self.acceleration, self.module, self.name = acceleration, module, name
        self.backend, self.verify = backend, verify
        self.added = False

    def add(self) -> None:
        """Let those parts run in the engine that are upstream's."""
        if self.added:
            return
        self.added = True
        parts: list[Part] = []
        for path, kind, module in find_pieces(self.module):
            name = ".".join(filter(None, (self.name, path)))
            if isinstance(self.module, Aggregator):
                raise InputError(f"model: {name or 'it'} has an engine already")
            part = kind(module, name, self.verify, self.backend)
            part.look()
            parts.append(part)
        self.acceleration.add(parts)


def _adapter_of(module: nn.Module, adapters: Mapping[type[nn.Module], Adapter]) -> Adapter | None:
    for kind in type(module).__mro__:
        if kind in adapters:
            adapter = adapters[kind]
            if not isinstance(adapter, Adapter):
                raise InputTypeError(f"adapters: expected an Adapter for {kind.__name__}, got {adapter!r}")
            return adapter
    return None


def _check_untouched(module: nn.Module, name: str) -> None:
    if isinstance(module, Aggregator) or is_accelerated(module):
        raise InputError(f"model: {name or 'it'} has an engine already")
    if "_orig_mod" in name.split(".") or hasattr(module, "_orig_mod"):
        raise InputError(f"model: {name or 'it'} is compiled already; accelerate first, then compile")
    if "forward" in vars(module):
        raise InputError(f"model: {name or 'it'} has a forward of its own, which would be ignored")
    if vars(module).get("_compiled_call_impl") is not None:
        raise InputError(f"model: {name or 'it'} is compiled already; accelerate first, then compile")


def _why_nothing(model: nn.Module, refusals: list[str]) -> str:
    if refusals:
        return "; ".join(refusals)
    nearest = nearest_candidate(model)
    found = f"no aggregator was found in this {type(model).__name__}"
    return found if nearest is None else f"{found}; the nearest is {nearest}"
