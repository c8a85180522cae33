"""Copies of modules on which their code is tried: small maps, few classes, random numbers everywhere.

The numbers that a model happens to have can hide what its code does: a zero-initialised gate, a buffer that
a checkpoint fills later. So that a trial is quick, windows are made as small as the shift and the pooling
allow, and few classes count as many; a map of one window stays one, and a map of several keeps several.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from catseg_fast.acceleration.layers import Mismatch, unwrapped
from catseg_fast.reference.window_attention import shifted_window_mask

LEAST_PAD_LEN = 4


def copy_for_trial(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode and in float64, with random parameters and buffers.

    Raises:
        Mismatch: if it cannot be copied.
    """
    try:
        duplicate: nn.Module = copy.deepcopy(module)
    except Exception as error:  # whatever the module's attributes raise
        raise Mismatch(f"it cannot be copied for a trial: {error}") from error
    duplicate = strip(duplicate).eval().requires_grad_(False).double()
    randomise(duplicate)
    return duplicate


def strip(module: nn.Module) -> nn.Module:
    """Take `torch.compile`'s wrappers and the weights that hooks have computed off a copy."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = unwrapped(child)
        vars(parent).pop("_compiled_call_impl", None)
    result: nn.Module = unwrapped(module)
    return result


def randomise(module: nn.Module) -> None:
    """Fill parameters and floating buffers with random numbers; masks of windows stay."""
    device = next((x.device for x in module.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(17)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point():
                continue
            leaf = name.rsplit(".", 1)[-1]
            if parameter.ndim <= 1:
                parameter.copy_((leaf == "weight") + 0.3 * normal(parameter))
            elif parameter.shape[0] == 1 and parameter.ndim == 3:  # padding tokens
                parameter.copy_(0.7 * normal(parameter))
            else:
                fan_in = max(1, parameter.numel() // parameter.shape[0])
                parameter.copy_(normal(parameter) * (1.5 / fan_in**0.5))
        for name, buffer in module.named_buffers():
            leaf = name.rsplit(".", 1)[-1]
            if not buffer.is_floating_point() or leaf in ("attn_mask", "weight_u", "weight_v", "_u", "_v"):
                continue
            buffer.copy_(
                0.5 + torch.rand(buffer.shape, generator=generator, device=device, dtype=buffer.dtype)
            )


def lower_pad_len(module: nn.Module) -> list[int]:
    """Let few classes count as many everywhere; return the numbers of classes at which something changes."""
    holders = [(m, key) for m in module.modules() for key in ("pad_len", "_max_classes") if _is_count(m, key)]
    lengths = sorted({vars(m)[key] for m, key in holders})
    lower = {length: min(length, LEAST_PAD_LEN + index) for index, length in enumerate(lengths)}
    for holder, key in holders:
        vars(holder)[key] = lower[vars(holder)[key]]
    return sorted(set(lower.values()))


def shrink(module: nn.Module) -> tuple[int, int] | None:
    """Make windows and maps small, not square where there are several windows; return the new (H, W).

    None, and nothing is changed, if there is no window block, or blocks have other maps or windows.
    """
    blocks: list[Any] = [
        m for m in module.modules() if hasattr(m, "input_resolution") and hasattr(m, "window_size")
    ]
    windows = {(tuple(block.input_resolution), _side(block.window_size)) for block in blocks}
    pools = [_side(getattr(m, "kernel_size", 1)) for m in module.modules() if isinstance(m, nn.AvgPool2d)]
    if len(windows) != 1 or 0 in pools:
        return None
    (resolution, window), pool = windows.pop(), math.lcm(*pools)
    if len(resolution) != 2 or not window or resolution[0] % window or resolution[1] % window:
        return None
    small = pool if pool > 1 else 2
    several = min(resolution) > window
    size = (small * (resolution[0] // window), small * (resolution[1] // window + several))
    if small >= window:
        return None
    for block in blocks:
        shift = small // 2 if block.shift_size else 0
        block.input_resolution = size if isinstance(block.input_resolution, tuple) else list(size)
        block.window_size = small if isinstance(block.window_size, int) else (small, small)
        block.shift_size = shift
        if hasattr(block, "nominal_window"):
            block.nominal_window = (small, shift)
        if hasattr(block.attn, "window_size"):
            block.attn.window_size = small if isinstance(block.attn.window_size, int) else (small, small)
        if hasattr(block.attn, "window_area"):
            block.attn.window_area = small * small
        mask = getattr(block, "attn_mask", None)
        if mask is not None:
            block.attn_mask = shifted_window_mask(size, small, shift).to(mask.device, mask.dtype)
    return size


def _is_count(module: nn.Module, key: str) -> bool:
    value = vars(module).get(key)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _side(value: Any) -> int:
    """The side of a square; 0 if it is none."""
    if isinstance(value, int):
        return value
    return value[0] if len({*value}) == 1 and isinstance(value[0], int) else 0
