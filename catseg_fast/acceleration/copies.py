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

from catseg_fast.acceleration.layers import PLAIN, Mismatch, unwrapped
from catseg_fast.reference.window_attention import shifted_window_mask

LEAST_PAD_LEN = 4
LEAST_PROMPTS = 3

# By how much the weights of a head, and of some channels of an embedding, are larger than others: what bounds
# the answer or the state shows.
LARGE, LARGE_CHANNELS = 30.0, slice(None, None, 16)

# Number of random numbers that are drawn; they repeat after that. It is prime, so that no two rows of a
# weight are alike.
DRAWN = 65_521

# Buffers that stay as they are: masks of windows, and vectors of spectral norms.
KEPT = ("attn_mask", "weight_u", "weight_v", "_u", "_v")


def copy_for_trial(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode and in float64, with random parameters and buffers.

    Raises:
        Mismatch: if it cannot be copied.
    """
    try:
        duplicate: nn.Module = copy.deepcopy(module, _random_tensors(module))
    except Exception as error:  # whatever the module's attributes raise
        raise Mismatch(f"it cannot be copied for a trial: {error}") from error
    return strip(duplicate).eval().requires_grad_(False).double()


def strip(module: nn.Module) -> nn.Module:
    """Take `torch.compile`'s wrappers off a copy."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = unwrapped(child)
        vars(parent).pop("_compiled_call_impl", None)
    result: nn.Module = unwrapped(module)
    return result


def _random_tensors(module: nn.Module) -> dict[int, Tensor]:
    """Return random tensors in place of a module's parameters and buffers, by `id`, as `deepcopy` takes them.

    Integers, masks of windows, and tensors of other classes are not among them.
    """
    parameters, buffers = (
        {name: x for name, x in named if type(x) in PLAIN and x.is_floating_point()}
        for named in (module.named_parameters(), module.named_buffers())
    )
    numbers = _Numbers([*parameters.values(), *buffers.values()])
    found: dict[int, Tensor] = {}
    for name, x in parameters.items():
        values, leaf = numbers.like(x), name.rsplit(".", 1)[-1]
        if x.ndim <= 1:
            values = (leaf == "weight") + 0.3 * values
        elif x.shape[0] == 1 and x.ndim == 3:  # padding tokens
            values = 0.7 * values
        else:
            values = values * (LARGE if len(x) == 1 else 1.0)
            values = values * (1.5 / max(1, x.numel() // max(1, len(x))) ** 0.5)
            if name == "conv1.weight":
                values[LARGE_CHANNELS] *= LARGE
        found[id(x)] = nn.Parameter(values, requires_grad=False)
    for name, x in buffers.items():
        if name.rsplit(".", 1)[-1] not in KEPT:
            found[id(x)] = 0.5 + numbers.like(x).sigmoid()
    for owner in module.modules():  # weights that hooks have computed, which `deepcopy` may refuse
        for x in vars(owner).values():
            if type(x) is Tensor and x.grad_fn is not None:
                found[id(x)] = x.detach().clone()
    for x in (*parameters.values(), *buffers.values()):
        if id(x) in found:
            vars(found[id(x)]).update(vars(x))  # attributes that the user gave it
    return found


class _Numbers:
    """Random numbers with a normal distribution, in float64."""

    def __init__(self, tensors: list[Tensor]) -> None:
        device = tensors[0].device if tensors else torch.device("cpu")
        generator = torch.Generator(device).manual_seed(17)
        drawn = torch.randn(DRAWN, generator=generator, device=device, dtype=torch.float64)
        largest = max((x.numel() for x in tensors), default=0)
        self._numbers, self._next = drawn.repeat(2 + largest // DRAWN), 0

    def like(self, x: Tensor) -> Tensor:
        start, self._next = self._next, (self._next + x.numel()) % DRAWN
        return self._numbers[start : start + x.numel()].view(x.shape).to(x.device, copy=True)


def lower_prompts(module: nn.Module) -> bool:
    """Let an embedding take few prompts per class; return whether it did not before.

    Nothing is changed if it is anything but a plain convolution.
    """
    embedding = getattr(module, "conv1", None)
    if type(embedding) is not nn.Conv2d or embedding.groups != 1 or embedding._forward_pre_hooks:
        return False
    weight, prompts = embedding.weight, embedding.in_channels
    if prompts <= LEAST_PROMPTS or weight.shape[1] != prompts:
        return False
    few = weight[:, :LEAST_PROMPTS] * (prompts / LEAST_PROMPTS) ** 0.5
    embedding.in_channels, embedding.weight = LEAST_PROMPTS, nn.Parameter(few, requires_grad=False)
    return True


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
