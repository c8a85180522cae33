"""Exact reading of modules built like upstream's: the reference's counterpart, with the same tensors.

Sizes, kinds of layers and their settings are read, never assumed; what the engine cannot honour is a
`Mismatch` that names it. What a module's own code does with its layers cannot be read: `trial.py` compares
that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from catseg_fast import reference
from catseg_fast.acceleration.layers import (
    WEIGHT_HOOKS,
    Mismatch,
    child_of,
    number_of,
    on_meta,
    original_kind,
    pair_of,
    read_layers,
    side_of,
    unwrapped,
    weight_shape,
)
from catseg_fast.reference.window_attention import shifted_window_mask


def read_aggregator(source: nn.Module) -> nn.Module:
    """Return what `Engine` runs: a module with an aggregator's parts; its projections are the source's own.

    Raises:
        Mismatch: if there is something that the engine cannot honour.
    """
    check_hooks(source)
    twin: Any = nn.Module()
    twin.layers = nn.ModuleList()
    for index, layer in enumerate(child_of(source, "layers").children()):
        layer, path = unwrapped(layer), f"layers.{index}"
        pair = nn.Module()
        pair.swin_block = read_window_pair(child_of(layer, "swin_block", path), f"{path}.swin_block")
        pair.attention = read_class_layer(child_of(layer, "attention", path), f"{path}.attention")
        twin.layers.append(pair)
    embedding = child_of(source, "conv1")
    prompts, channels = weight_shape(embedding, "conv1", ndim=4)[1::-1]
    twin.conv1 = read_layers(embedding, on_meta(nn.Conv2d, prompts, channels, 7, padding=3), "conv1")
    twin.decoder1, twin.decoder2, twin.head = read_decoder(source)
    for name in ("guidance_projection", "text_guidance_projection", "decoder_guidance_projection"):
        setattr(twin, name, child_of(source, name, optional=True))
    _check_channels(twin, channels)
    _check_placement(twin)
    return twin


def read_window_pair(source: nn.Module, path: str) -> Any:
    """Return the counterpart of two window blocks under one guidance; see `read_aggregator`."""
    first, second = (
        read_window_block(child_of(source, name, path), f"{path}.{name}") for name in ("block_1", "block_2")
    )
    norm = child_of(source, "guidance_norm", path, optional=True)
    width = first.attn.q.in_features - first.dim
    if (norm is not None) != (width > 0) or second.attn.q.in_features - second.dim != width:
        raise Mismatch(
            f"{path}.guidance_norm does not fit the guidance that block_1.attn.q and block_2.attn.q take"
        )
    twin: Any = nn.Module()
    twin.block_1, twin.block_2, twin.guidance_norm = first, second, None
    if norm is not None:
        eps = float(number_of(norm, "eps", f"{path}.guidance_norm"))
        twin.guidance_norm = read_layers(norm, on_meta(nn.LayerNorm, width, eps=eps), f"{path}.guidance_norm")
    return twin


def read_window_block(source: nn.Module, path: str) -> reference.SwinTransformerBlock:
    """Return the counterpart of a window block; see `read_aggregator`."""
    attention, mlp = child_of(source, "attn", path), child_of(source, "mlp", path)
    inner, width = weight_shape(child_of(attention, "q", f"{path}.attn"), f"{path}.attn.q")
    _, channels = weight_shape(child_of(attention, "v", f"{path}.attn"), f"{path}.attn.v")
    hidden, _ = weight_shape(child_of(mlp, "fc1", f"{path}.mlp"), f"{path}.mlp.fc1")
    heads = number_of(attention, "num_heads", f"{path}.attn")
    if inner != channels:
        raise Mismatch(f"{path}.attn.q has {inner} outputs, expected {channels}")
    nominal = getattr(source, "nominal_window", None) or (
        side_of(source, "window_size", path), number_of(source, "shift_size", path)
    )  # fmt: skip
    resolution = tuple(getattr(source, "input_resolution", ()))
    if len(resolution) != 2:
        raise Mismatch(f"{path}.input_resolution is {resolution}, expected (H, W)")
    twin = on_meta(
        reference.SwinTransformerBlock, channels, width - channels, resolution, heads,
        window_size=nominal[0], shift_size=nominal[1], mlp_ratio=hidden / channels,
    )  # fmt: skip
    twin.attn.scale = float(number_of(attention, "scale", f"{path}.attn"))
    _check_mask(source, twin, path)
    return read_layers(source, twin, path)


def read_class_layer(source: nn.Module, path: str) -> reference.ClassTransformerLayer:
    """Return the counterpart of a class-attention layer; see `read_aggregator`."""
    attention = child_of(source, "attention", path)
    channels, width = weight_shape(child_of(attention, "q", f"{path}.attention"), f"{path}.attention.q")
    inner = child_of(attention, "attention", f"{path}.attention")
    linear = hasattr(inner, "eps")
    pool = child_of(source, "pool", path)
    kernel = pair_of(getattr(pool, "kernel_size", 1))
    pooled = original_kind(pool) is nn.AvgPool2d
    padded = getattr(source, "padding_tokens", None) is not None
    twin = on_meta(
        reference.ClassTransformerLayer, channels, width - channels, number_of(attention, "nheads", path),
        "linear" if linear else "full", kernel if pooled else None,
        int(number_of(source, "pad_len", path)) if padded else 0,
    )  # fmt: skip
    if linear:
        twin.attention.attention.eps = float(number_of(inner, "eps", f"{path}.attention.attention"))
    hidden, _ = weight_shape(child_of(child_of(source, "MLP", path), "0", f"{path}.MLP"), f"{path}.MLP.0")
    twin.MLP[0], twin.MLP[2] = (
        on_meta(nn.Linear, *size) for size in ((channels, hidden), (hidden, channels))
    )
    return read_layers(source, twin, path)


def read_decoder(source: nn.Module, path: str = "") -> tuple[reference.Up, reference.Up, nn.Conv2d]:
    """Return the counterparts of `decoder1`, `decoder2` and `head`; see `read_aggregator`."""
    first, second = (_read_stage(child_of(source, name, path), name) for name in ("decoder1", "decoder2"))
    channels = second.conv.double_conv[3].out_channels
    head = read_layers(child_of(source, "head", path), on_meta(nn.Conv2d, channels, 1, 3, padding=1), "head")
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


def _read_stage(source: nn.Module, path: str) -> reference.Up:
    up, convolutions = (
        child_of(source, "up", path),
        child_of(child_of(source, "conv", path), "double_conv", path),
    )
    path = f"{path}.conv.double_conv"
    channels, transposed = weight_shape(up, path, ndim=4)[:2]
    width, wide = weight_shape(child_of(convolutions, "0", path), f"{path}.0", ndim=4)[:2]
    twin = on_meta(reference.Up, channels, width, channels - transposed)
    if wide != channels:
        twin.conv.double_conv[0] = on_meta(nn.Conv2d, wide, width, 3, padding=1, bias=False)
    for index, outputs in (("1", width), ("4", width)):
        norm = child_of(convolutions, index, path)
        groups = number_of(norm, "num_groups", f"{path}.{index}")
        if outputs % groups:
            raise Mismatch(f"{path}.{index}.num_groups is {groups}, which does not divide {outputs}")
        twin.conv.double_conv[int(index)] = on_meta(nn.GroupNorm, groups, outputs, eps=float(norm.eps))
    return read_layers(source, twin, path.removesuffix(".conv.double_conv"))


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
