"""The engine's stages in plain torch ops: pure functions of folded weights and a chunk of classes.

A chunk's state is `[B, t, HW, C]`, channels last, for B crops and t classes. Every stage works on any chunk;
classes are combined only in the class memory (`class_memory.py`). All stages are differentiable. They call
the plain forms of the ops (`kernels/*/plain.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from catseg_fast.engine import arguments
from catseg_fast.engine.class_memory import ClassMemory
from catseg_fast.engine.folding import ClassLayer, Plan, WindowBlock
from catseg_fast.engine.terms import BlockGuidance
from catseg_fast.kernels.class_attention import plain as class_attention
from catseg_fast.kernels.cost_volume import plain as cost_volume
from catseg_fast.kernels.decoder import plain as decoder
from catseg_fast.kernels.window_attention import plain as window_attention


def embed_cost_volume(plan: Plan, image: Tensor, text: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Compute the cost volume and its 7x7 convolution.

    Args:
        plan: the folded weights.
        image: unit image features `[B, HW, F]`.
        text: unit text features `[B or 1, t, P, F]`.
        resolution: (H, W).

    Returns:
        `[B, t, HW, C]`.
    """
    return cost_volume.embed_cost_volume(image, text, *arguments.embedding(plan), resolution)


# Collecting all classes at once would take twice the memory of the state for their keys and values.
collects_at_once = False
repeats = False


def as_one(key: object, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Return `run(*inputs)`."""
    return run(*inputs)


def window_block(block: WindowBlock, guidance: BlockGuidance, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Apply guided window attention and MLP, both with residual: `x [B, t, HW, C]` to the same shape.

    The result is written to `out`, if given.
    """
    result = window_attention.ordered_block(
        x, guidance.query_key, arguments.window_weights(block),
        guidance.order, guidance.inverse, guidance.masks, block.heads,
    )  # fmt: skip
    return result if out is None else out.copy_(result)


def class_collect(
    layer: ClassLayer,
    memory: ClassMemory,
    x: Tensor,
    text_key: Tensor | None,
    resolution: tuple[int, int],
    last: bool = False,
) -> None:
    """Add the keys and values of a chunk `x [B, t, HW, C]` to the memory of all classes.

    `text_key [B or 1, t, C]` is the text guidance's part of the keys. The `last` chunk closes the memory.
    """
    pooling = layer.pooling or (1, 1)
    memory.add(*class_attention.keys_and_values(x, layer.kv, layer.kv_bias, text_key, resolution, pooling))
    if last:
        memory.close(x.dtype)


def class_apply(
    layer: ClassLayer, x: Tensor, text_query: Tensor | None, memory: ClassMemory, resolution: tuple[int, int]
) -> Tensor:
    """Apply class attention from the memory of all classes, and MLP, both with residual: `[B, t, HW, C]`."""
    weights, pooling = arguments.apply_weights(layer), layer.pooling or (1, 1)
    return class_attention.apply_attention(x, text_query, weights, resolution, pooling, memory.attend)


def decode(
    plan: Plan,
    guidance: tuple[Tensor, Tensor],
    x: Tensor,
    resolution: tuple[int, int],
    out: Tensor | None = None,
    flag: Tensor | None = None,
) -> Tensor:
    """Upsample `x [B, t, HW, C]` to logits `[B, t, 4H, 4W]`, which are written to `out`, if given.

    `flag`, `[1]` int32, is set to 1 if a logit is infinite or NaN.

    `guidance` holds each stage's `[B or 1, out, 2H, 2W]`, the part of its first convolution that is the same
    for every class.
    """
    maps = [arguments.channels_last(added) for added in guidance]
    logits = decoder.decode(x, maps, *arguments.decoding(plan), resolution)
    if flag is not None:
        flag.logical_or_(~logits.isfinite().all())
    return logits if out is None else out.copy_(logits)
