"""Whether ops compute in Triton on this machine what they do in plain torch, before they are trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from catseg_fast.engine.folding import Plan
from catseg_fast.kernels import load
from catseg_fast.kernels.launch.op import Op, Random, Sizes
from catseg_fast.reference.window_attention import fit_window

CLASSES = 3

# Largest error that is accepted, in units of plain torch's in the same type. Of correct kernels it is below 2
# (`tests/support/accuracy.py`), over more values than here.
FACTOR = 4.0

# The stage that an op belongs to; of the others, it has the op's name.
STAGES = {"class_collect": "class_attention", "class_apply": "class_attention"}


def wrong_stages(
    plan: Plan, resolution: tuple[int, int], features: int, device: torch.device, input_precision: str
) -> dict[str, str]:
    """Run each op on random inputs of a plan's sizes, against its plain form in fp32 or float64.

    Args:
        plan: gives sizes and type.
        resolution: (H, W).
        features: F, of CLIP's features.
        device: where to run.
        input_precision: of products of fp32 numbers.

    Returns:
        By stage ("embed_cost_volume", "window_block", "class_attention", "decode"), how far it is off; empty
        if all are right. What overflows in torch, too, proves nothing and is passed over.
    """
    wrong: dict[str, str] = {}
    for name, sizes in op_sizes(plan, resolution, features):
        reason = _compare(load(name), sizes, plan.embed.dtype, device, input_precision)
        if reason is not None:
            wrong[STAGES.get(name, name)] = reason
    return wrong


def op_sizes(plan: Plan, resolution: tuple[int, int], features: int) -> Iterator[tuple[str, Sizes]]:
    """The ops that a plan needs and can run, by name, with the sizes that they have for it."""
    from catseg_fast.kernels.class_attention import op as class_attention
    from catseg_fast.kernels.window_attention import op as window_attention

    height, width = resolution
    base = Sizes(1, CLASSES, height, width, plan.channels)
    yield "embed_cost_volume", replace(base, features=features, prompts=plan.prompts)
    found: dict[tuple[str, Sizes], None] = {}
    for layer in plan.layers:
        for block in layer.blocks:
            window, shift = fit_window(resolution, block.window, block.shift)
            sizes = replace(base, heads=block.heads, window=window, shift=shift, hidden=len(block.fc1))
            if window_attention.unsupported(plan.channels, block.heads, block.window) is None:
                found["window_block", sizes] = None
        classes = layer.classes
        pooling, hidden = classes.pooling or (1, 1), len(classes.fc1)
        sizes = replace(base, heads=classes.heads, hidden=hidden, pooling=pooling)
        if classes.linear and class_attention.unsupported(plan.channels) is None:
            found |= dict.fromkeys([("class_collect", sizes), ("class_apply", sizes)])
    yield from found
    widths = tuple(stage.conv.shape[0] for stage in plan.decoder)
    group = widths[0] // plan.decoder[0].norm1.groups
    yield "decode", replace(base, decoder=widths, group=group)


@torch.no_grad()
def _compare(
    op: Op, sizes: Sizes, dtype: torch.dtype, device: torch.device, input_precision: str
) -> str | None:
    """How far an op is off; None if it is right."""
    inputs = op.make_inputs(sizes, Random(dtype, device))
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    truth = op.plain(**{name: _cast(value, exact) for name, value in inputs.items()})
    eager = op.plain(**inputs)
    ours = op.triton(**inputs, input_precision=input_precision)
    for tensors in zip(*map(_parts, (ours, eager, truth)), strict=True):
        found, allowed = (_error(x, tensors[2]) for x in tensors[:2])
        if FACTOR * allowed < float("inf") and not found <= FACTOR * allowed:
            return f"error {found:.1e}, of torch {allowed:.1e}"
    return None


def _parts(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _error(x: Tensor, truth: Tensor) -> float:
    return (x.to(truth.dtype) - truth).abs().max().item()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same with every floating tensor in it in a type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    return value
