"""Exact reading of modules built like upstream's: the reference's counterpart, with the very same tensors.

Sizes, kinds of layers and their settings are read, never assumed; what the engine cannot honour is a
`Mismatch` that names it. What a module's own code does with its layers cannot be read: `trial.py` compares
that.
"""

from __future__ import annotations

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

from catseg_fast import reference
from catseg_fast.reference.window_attention import shifted_window_mask

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

# Hooks that compute a weight before each call, and no more.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


class Mismatch(Exception):
    """A module cannot run in the engine; the message names the difference."""

    def __init__(self, message: str) -> None:
        super().__init__(message.lstrip("."))  # of a path that starts at the module itself


def read_aggregator(source: nn.Module) -> nn.Module:
    """Return what `Engine` runs: a module with an aggregator's parts; its projections are the source's own.

    Raises:
        Mismatch: if there is something that the engine cannot honour.
    """
    check_hooks(source)
    twin: Any = nn.Module()
    twin.layers = nn.ModuleList()
    for index, layer in enumerate(_child(source, "layers").children()):
        layer, path = unwrapped(layer), f"layers.{index}"
        pair = nn.Module()
        pair.swin_block = read_window_pair(_child(layer, "swin_block", path), f"{path}.swin_block")
        pair.attention = read_class_layer(_child(layer, "attention", path), f"{path}.attention")
        twin.layers.append(pair)
    embedding = _child(source, "conv1")
    prompts, channels = _sizes(embedding, "conv1", ndim=4)[1::-1]
    twin.conv1 = _read(embedding, _on_meta(nn.Conv2d, prompts, channels, 7, padding=3), "conv1")
    twin.decoder1, twin.decoder2, twin.head = read_decoder(source)
    for name in ("guidance_projection", "text_guidance_projection", "decoder_guidance_projection"):
        setattr(twin, name, _child(source, name, optional=True))
    _check_channels(twin, channels)
    _check_placement(twin)
    return twin


def read_window_pair(source: nn.Module, path: str) -> Any:
    """Return the counterpart of two window blocks under one guidance; see `read_aggregator`."""
    first, second = (
        read_window_block(_child(source, name, path), f"{path}.{name}") for name in ("block_1", "block_2")
    )
    norm = _child(source, "guidance_norm", path, optional=True)
    width = first.attn.q.in_features - first.dim
    if (norm is not None) != (width > 0) or second.attn.q.in_features - second.dim != width:
        raise Mismatch(
            f"{path}.guidance_norm does not fit the guidance that block_1.attn.q and block_2.attn.q take"
        )
    twin: Any = nn.Module()
    twin.block_1, twin.block_2, twin.guidance_norm = first, second, None
    if norm is not None:
        eps = float(_number(norm, "eps", f"{path}.guidance_norm"))
        twin.guidance_norm = _read(norm, _on_meta(nn.LayerNorm, width, eps=eps), f"{path}.guidance_norm")
    return twin


def read_window_block(source: nn.Module, path: str) -> reference.SwinTransformerBlock:
    """Return the counterpart of a window block; see `read_aggregator`."""
    attention, mlp = _child(source, "attn", path), _child(source, "mlp", path)
    inner, width = _sizes(_child(attention, "q", f"{path}.attn"), f"{path}.attn.q")
    _, channels = _sizes(_child(attention, "v", f"{path}.attn"), f"{path}.attn.v")
    hidden, _ = _sizes(_child(mlp, "fc1", f"{path}.mlp"), f"{path}.mlp.fc1")
    heads = _number(attention, "num_heads", f"{path}.attn")
    if inner != channels:
        raise Mismatch(f"{path}.attn.q has {inner} outputs, expected {channels}")
    nominal = getattr(source, "nominal_window", None) or (
        _side(source, "window_size", path), _number(source, "shift_size", path)
    )  # fmt: skip
    resolution = tuple(getattr(source, "input_resolution", ()))
    if len(resolution) != 2:
        raise Mismatch(f"{path}.input_resolution is {resolution}, expected (H, W)")
    twin = _on_meta(
        reference.SwinTransformerBlock, channels, width - channels, resolution, heads,
        window_size=nominal[0], shift_size=nominal[1], mlp_ratio=hidden / channels,
    )  # fmt: skip
    twin.attn.scale = float(_number(attention, "scale", f"{path}.attn"))
    _check_mask(source, twin, path)
    return _read(source, twin, path)


def read_class_layer(source: nn.Module, path: str) -> reference.ClassTransformerLayer:
    """Return the counterpart of a class-attention layer; see `read_aggregator`."""
    attention = _child(source, "attention", path)
    channels, width = _sizes(_child(attention, "q", f"{path}.attention"), f"{path}.attention.q")
    inner = _child(attention, "attention", f"{path}.attention")
    linear = hasattr(inner, "eps")
    pool = _child(source, "pool", path)
    kernel = _pair(getattr(pool, "kernel_size", 1))
    pooled = _original(pool) is nn.AvgPool2d
    padded = getattr(source, "padding_tokens", None) is not None
    twin = _on_meta(
        reference.ClassTransformerLayer, channels, width - channels, _number(attention, "nheads", path),
        "linear" if linear else "full", kernel if pooled else None,
        int(_number(source, "pad_len", path)) if padded else 0,
    )  # fmt: skip
    if linear:
        twin.attention.attention.eps = float(_number(inner, "eps", f"{path}.attention.attention"))
    hidden, _ = _sizes(_child(_child(source, "MLP", path), "0", f"{path}.MLP"), f"{path}.MLP.0")
    twin.MLP[0], twin.MLP[2] = (
        _on_meta(nn.Linear, *size) for size in ((channels, hidden), (hidden, channels))
    )
    return _read(source, twin, path)


def read_decoder(source: nn.Module, path: str = "") -> tuple[reference.Up, reference.Up, nn.Conv2d]:
    """Return the counterparts of `decoder1`, `decoder2` and `head`; see `read_aggregator`."""
    first, second = (_read_stage(_child(source, name, path), name) for name in ("decoder1", "decoder2"))
    channels = second.conv.double_conv[3].out_channels
    head = _read(_child(source, "head", path), _on_meta(nn.Conv2d, channels, 1, 3, padding=1), "head")
    return first, second, head


def check_hooks(source: nn.Module, path: str = "") -> None:
    """Check that nothing is hooked to the modules below one.

    Raises:
        Mismatch: if there is a hook that may do anything but compute a weight.
    """
    for name, module in source.named_modules():
        if module is source:
            continue
        name = f"{path}.{name}" if path else name
        if isinstance(module, torch.jit.ScriptModule):
            raise Mismatch(f"{name} is traced or scripted by torch.jit")
        for kind, hooks in (
            ("forward pre-hook", module._forward_pre_hooks),
            ("forward hook", module._forward_hooks),
        ):
            for hook in hooks.values():
                if not isinstance(hook, WEIGHT_HOOKS):
                    raise Mismatch(f"{name} has a {kind}, {getattr(hook, '__name__', type(hook).__name__)!r}")


def unwrapped(module: Any) -> Any:
    """Return the module inside `torch.compile`'s wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _read_stage(source: nn.Module, path: str) -> reference.Up:
    up, convolutions = _child(source, "up", path), _child(_child(source, "conv", path), "double_conv", path)
    path = f"{path}.conv.double_conv"
    channels, transposed = _sizes(up, path, ndim=4)[:2]
    width, wide = _sizes(_child(convolutions, "0", path), f"{path}.0", ndim=4)[:2]
    twin = _on_meta(reference.Up, channels, width, channels - transposed)
    if wide != channels:
        twin.conv.double_conv[0] = _on_meta(nn.Conv2d, wide, width, 3, padding=1, bias=False)
    for index, outputs in (("1", width), ("4", width)):
        norm = _child(convolutions, index, path)
        groups = _number(norm, "num_groups", f"{path}.{index}")
        if outputs % groups:
            raise Mismatch(f"{path}.{index}.num_groups is {groups}, which does not divide {outputs}")
        twin.conv.double_conv[int(index)] = _on_meta(nn.GroupNorm, groups, outputs, eps=float(norm.eps))
    return _read(source, twin, path.removesuffix(".conv.double_conv"))


def _read(source: nn.Module, twin: Any, path: str) -> Any:
    """Give a counterpart the tensors of a module, layer by layer; return the counterpart."""
    source = unwrapped(source)
    if type(twin) in SETTINGS or type(twin) in INERT:
        _read_layer(source, twin, path)
        return twin
    for name, parameter in list(twin._parameters.items()):
        if parameter is not None:
            _put(twin, name, getattr(source, name, None), path)
    for name, child in twin.named_children():
        own = _child(source, name, path, optional=type(child) in INERT)
        if own is not None:
            _read(own, child, f"{path}.{name}")
    return twin


def _read_layer(source: nn.Module, twin: nn.Module, path: str) -> None:
    kind = type(twin)
    if kind in INERT:
        if _original(source) not in INERT:
            raise Mismatch(f"{path} is a {type(source).__name__}, expected none")
        return
    if _original(source) is not kind:
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
    if type(tensor) not in (Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor)):
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


def _check_mask(source: nn.Module, twin: reference.SwinTransformerBlock, path: str) -> None:
    found = getattr(source, "attn_mask", None)
    if twin.shift_size == 0:
        if found is not None:
            raise Mismatch(f"{path}.attn_mask is {tuple(found.shape)}, expected none")
        return
    expected = shifted_window_mask(twin.input_resolution, twin.window_size, twin.shift_size)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else found
        raise Mismatch(f"{path}.attn_mask is {shape}, expected {tuple(expected.shape)}")
    if found.is_meta:
        raise Mismatch(f"{path}.attn_mask is on the meta device; load the weights first")
    if not torch.equal(found.float(), expected.to(found.device)):
        raise Mismatch(f"{path}.attn_mask is another one than upstream's for shifted windows")


def _check_channels(twin: Any, channels: int) -> None:
    for index, layer in enumerate(twin.layers):
        for path, found in (
            (f"layers.{index}.swin_block", layer.swin_block.block_1.dim),
            (f"layers.{index}.swin_block", layer.swin_block.block_2.dim),
            (f"layers.{index}.attention", layer.attention.attention.v.in_features),
        ):
            if found != channels:
                raise Mismatch(f"{path} has {found} channels, conv1 has {channels}")


def _check_placement(twin: nn.Module) -> None:
    first: Tensor | None = None
    for name, parameter in twin.named_parameters():
        first = parameter if first is None else first
        if parameter.is_meta:
            raise Mismatch(f"{name} is on the meta device; load the weights first")
        if parameter.device != first.device:
            raise Mismatch(f"{name} is on {parameter.device}, other weights are on {first.device}")


def _child(source: nn.Module, name: str, path: str = "", optional: bool = False) -> Any:
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


def _sizes(layer: nn.Module, path: str, ndim: int = 2) -> tuple[int, ...]:
    """Return the shape of a layer's weight."""
    with _settled(layer) if _original(layer) in SETTINGS else _nothing():
        weight: Any = getattr(layer, "weight", None)
    if nn.parameter.is_lazy(weight):
        raise Mismatch(f"{path}.weight is not initialised yet; run the model once")
    if not isinstance(weight, Tensor) or weight.ndim != ndim:
        raise _wrong_kind(layer, path, "Linear" if ndim == 2 else "a convolution")
    return tuple(weight.shape)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _number(source: nn.Module, name: str, path: str) -> Any:
    value = getattr(source, name, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Mismatch(f"{path}.{name} is {'missing' if value is None else repr(value)}, expected a number")
    return value


def _side(source: nn.Module, name: str, path: str) -> int:
    first, second = _pair(getattr(source, name, None))
    if first != second or not isinstance(first, int):
        raise Mismatch(f"{path}.{name} is {getattr(source, name, 'missing')}, expected the side of a square")
    return first


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[-1])
    return (value, value)


def _plain(value: Any) -> Any:
    """Return a setting in the form in which the reference's is compared."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1 and len(value) > 1:
        return value[0]
    return tuple(value) if isinstance(value, list) else value


def _original(layer: nn.Module) -> type | None:
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
    """Does not fill new tensors: the meta device takes its time for that."""

    fills = (Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.fills else func(*args, **(kwargs or {}))


def _on_meta(kind: Any, *arguments: Any, **options: Any) -> Any:
    try:
        with torch.device("meta"), _Unfilled():
            return kind(*arguments, **options)
    except (ValueError, ZeroDivisionError, RuntimeError, TypeError) as error:
        raise Mismatch(f"no {kind.__name__} has these sizes: {error}") from error
