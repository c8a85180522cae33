"""Exact reading of single layers: their kind, their settings, and the tensors that they compute with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

# Layers that do nothing in evaluation; the guards see to it that they are not in training.
INERT = (nn.Identity, nn.Dropout, DropPath)

# Settings that must be those of the reference's layer; the other kinds of layer have none that matters.
SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: (),
    nn.ReLU: (),
    nn.GELU: ("approximate",),
    nn.LayerNorm: ("normalized_shape", "eps"),
    nn.GroupNorm: (),
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.ConvTranspose2d: ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups"),
    nn.AvgPool2d: (
        "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
    ),
}  # fmt: skip

# Classes of tensors without behaviour of their own.
PLAIN = (Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor))

# Hooks that compute a weight before each call, and no more.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


class Mismatch(Exception):
    """A module cannot run in the engine; the message names the difference."""

    def __init__(self, message: str) -> None:
        super().__init__(message.lstrip("."))  # of a path that starts at the module itself


def unwrapped(module: Any) -> Any:
    """Return the module inside `torch.compile`'s wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def read_layers(source: nn.Module, twin: Any, path: str) -> Any:
    """Give a counterpart the tensors of a module, layer by layer; return the counterpart."""
    source = unwrapped(source)
    if type(twin) in SETTINGS or type(twin) in INERT:
        _read_layer(source, twin, path)
        return twin
    for name, parameter in list(twin._parameters.items()):
        if parameter is not None:
            _put(twin, name, getattr(source, name, None), path)
    for name, child in twin.named_children():
        own = child_of(source, name, path, optional=type(child) in INERT)
        if own is not None:
            read_layers(own, child, f"{path}.{name}")
    return twin


def _read_layer(source: nn.Module, twin: nn.Module, path: str) -> None:
    kind = type(twin)
    if kind in INERT:
        if original_kind(source) not in INERT:
            raise Mismatch(f"{path} is a {type(source).__name__}, expected none")
        return
    if original_kind(source) is not kind:
        raise _wrong_kind(source, path, kind.__name__)
    for setting in SETTINGS[kind]:
        found, expected = (_plain(getattr(layer, setting)) for layer in (source, twin))
        if found != expected:
            raise Mismatch(f"{path}.{setting} is {found}, expected {expected}")
    with _settled(source):
        for name, parameter in list(twin._parameters.items()):
            tensor = getattr(source, name, None)
            if parameter is None:
                if tensor is not None:
                    raise Mismatch(f"{path}.{name} is {tuple(tensor.shape)}, expected none")
                continue
            weight: Any = getattr(source, "weight", None)
            if tensor is None and name == "bias" and weight is not None:
                tensor = torch.zeros(parameter.shape, dtype=weight.dtype, device=weight.device)
            _put(twin, name, tensor, path)


def _put(twin: nn.Module, name: str, tensor: Any, path: str) -> None:
    """Let a parameter of the counterpart be a tensor of the source."""
    expected = twin._parameters[name]
    assert expected is not None
    name_in_full = f"{path}.{name}" if path else name
    if tensor is None:
        raise Mismatch(f"{name_in_full} is missing, expected {tuple(expected.shape)}")
    if nn.parameter.is_lazy(tensor):
        raise Mismatch(f"{name_in_full} is not initialised yet; run the model once")
    if type(tensor) not in PLAIN:
        raise Mismatch(f"{name_in_full} is a {type(tensor).__name__}, expected a plain tensor")
    if tensor.shape != expected.shape:
        raise Mismatch(f"{name_in_full} is {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
    if tensor.is_meta:
        raise Mismatch(f"{name_in_full} is on the meta device; load the weights first")
    if not tensor.is_floating_point():
        raise Mismatch(f"{name_in_full} is of type {tensor.dtype}, expected floating point")
    own = isinstance(tensor, nn.Parameter)
    twin._parameters[name] = tensor if own else nn.Parameter(tensor.detach(), requires_grad=False)


@contextmanager
def _settled(layer: nn.Module) -> Iterator[None]:
    """Let a layer's weights be those of its next call in evaluation."""
    modes = [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def child_of(source: nn.Module, name: str, path: str = "", optional: bool = False) -> Any:
    """Return a module's child, without `torch.compile`'s wrapper."""
    child = getattr(source, name, None)
    if child is None and name.isdigit():
        child = source._modules.get(name)
    if child is None and optional:
        return None
    if not isinstance(child, nn.Module):
        where = f"{path}.{name}" if path else name
        raise Mismatch(f"{where} is {'missing' if child is None else 'no module'}")
    return unwrapped(child)


def weight_shape(layer: nn.Module, path: str, ndim: int = 2) -> tuple[int, ...]:
    """Return the shape of a layer's weight."""
    with _settled(layer) if original_kind(layer) in SETTINGS else _nothing():
        weight: Any = getattr(layer, "weight", None)
    if nn.parameter.is_lazy(weight):
        raise Mismatch(f"{path}.weight is not initialised yet; run the model once")
    if not isinstance(weight, Tensor) or weight.ndim != ndim:
        raise _wrong_kind(layer, path, "Linear" if ndim == 2 else "a convolution")
    return tuple(weight.shape)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def number_of(source: nn.Module, name: str, path: str) -> Any:
    """Return a module's attribute that must be a number."""
    value = getattr(source, name, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Mismatch(f"{path}.{name} is {'missing' if value is None else repr(value)}, expected a number")
    return value


def side_of(source: nn.Module, name: str, path: str) -> int:
    """Return the side of a square from a module's attribute."""
    first, second = pair_of(getattr(source, name, None))
    if first != second or not isinstance(first, int):
        raise Mismatch(f"{path}.{name} is {getattr(source, name, 'missing')}, expected the side of a square")
    return first


def pair_of(value: Any) -> tuple[Any, Any]:
    """Return a pair as it is, and a number twice."""
    if isinstance(value, (tuple, list)):
        return (value[0], value[-1])
    return (value, value)


def _plain(value: Any) -> Any:
    """Return a setting in the form in which the reference's is compared."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1 and len(value) > 1:
        return value[0]
    return tuple(value) if isinstance(value, list) else value


def original_kind(layer: nn.Module) -> type | None:
    """Return the kind of layer whose `forward` a layer has; None if it has one of its own."""
    if "forward" in vars(layer):
        return None
    forward = getattr(type(layer), "forward", None)
    for kind in (*SETTINGS, *INERT):
        if forward is kind.forward:
            return kind
    return None


def _wrong_kind(layer: nn.Module, path: str, expected: str) -> Mismatch:
    if "forward" in vars(layer):
        return Mismatch(f"{path} has a forward of its own, expected {expected}'s")
    kind = type(layer)
    found = kind.__name__ if kind.__name__ != expected else f"{kind.__module__}.{kind.__name__}"
    names = " ".join(name for name, _ in layer.named_parameters()).lower()
    advice = "; merge the LoRA first" if "lora" in names else ""
    return Mismatch(f"{path} is a {found}, expected {expected}{advice}")


class _Unfilled(TorchFunctionMode):
    """Mode in which new tensors are not filled, which takes time even on the meta device."""

    fills = (Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.fills else func(*args, **(kwargs or {}))


def on_meta(kind: Any, *arguments: Any, **options: Any) -> Any:
    """Return a module on the meta device, whose parameters are not filled."""
    try:
        return _restructured(_prototype(kind, arguments, tuple(options.items())))
    except (ValueError, ZeroDivisionError, RuntimeError, TypeError) as error:
        raise Mismatch(f"no {kind.__name__} has these sizes: {error}") from error


@functools.lru_cache(maxsize=64)
def _prototype(kind: Any, arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> nn.Module:
    with torch.device("meta"), _Unfilled():
        module: nn.Module = kind(*arguments, **dict(options))
        return module


def _restructured(prototype: nn.Module) -> nn.Module:
    """Return a copy whose modules are its own, and whose tensors are shared; `deepcopy` takes far longer."""
    twin: nn.Module = object.__new__(type(prototype))
    tables = {
        key: value.copy() if isinstance(value, dict) else value for key, value in vars(prototype).items()
    }
    vars(twin).update(tables)
    for name, child in twin._modules.items():
        twin._modules[name] = None if child is None else _restructured(child)
    return twin
