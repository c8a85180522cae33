"""Linear attention over classes, in two ops: `class_collect` sums over classes, `class_apply` uses the sums.

With phi(x) = elu(x) + 1 and norm without affine part, for each crop, position and head of d channels:

    n = norm(x);  k = phi(W_k n + b_k + text_key);  v = W_v n + b_v
    key_value = sum_t k_t v_t^T / length;  key_sum = sum_t k_t
    q = phi(W_q n + b_q + text_query);  y = x + length q key_value / (q key_sum + eps)
    out = x + y + W_2 relu(W_1 norm(y) + b_1) + b_2

Instead of `key_value`, the last call of `class_collect` may return the input of `class_apply`: for each
channel of a key, the mean of all values weighted by the keys, mean_j = length key_value_j / key_sum_j, in the
type of x. Then y = x + sum_j p_j mean_j with weights p_j = q_j key_sum_j / (q key_sum + eps). Weights and
means fit in fp16 for any keys.

With pooling (h, w), tokens are averages of h x w positions, and the result is interpolated bilinearly to all
positions. The kernels are in `collect.py`, `apply.py` and `unpool.py`.

Both ops compute in the type of x and accumulate in fp32, independently of autocast. They have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels.class_attention import apply, collect, plain
from catseg_fast.kernels.class_attention.checks import (
    check_input,
    check_sums,
    check_weights,
    pooled_positions,
)
from catseg_fast.kernels.launch.checks import check_destination, fits_32_bits
from catseg_fast.kernels.launch.op import Form, Op, Random, Sizes


def class_collect(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    text_key: Tensor | None,
    key_value: Tensor | None,
    key_sum: Tensor | None,
    heads: int,
    length: int,
    resolution: Sequence[int],
    pooling: Sequence[int] = (1, 1),
    means: bool = False,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Add a chunk's keys and values to sums over classes.

    Args:
        x: `[B, t, HW, C]`, fp16, bf16 or fp32, with any strides; it is copied if channels are not contiguous
            or positions are 2^31 numbers apart.
        weight, bias: `[2C, C]` and `[2C]`, of keys, then of values.
        text_key: the part of the keys that comes from the text guidance, `[B or 1, t, C]`, or None.
        key_value, key_sum: old sums in fp32, `[B, hw, heads, d, d]` and `[B, hw, heads, d]`, or without the
            first two dimensions if they are the same at every position; None for the first chunk. They are
            not overwritten.
        heads: attention heads.
        length: divisor of the values that keeps them in fp16's range: the number of all classes.
        resolution: (H, W).
        pooling: (h, w).
        means: whether this is the last chunk, and the means are computed from the sums.
        input_precision: precision of products of fp32 numbers: "ieee" or "tf32"; "tf32x3" means "ieee" here.

    Returns:
        The new `key_value`, or with `means` the means, which have the same shape and the type of x; and
        `key_sum`.

    Raises:
        ValueError: if the kernels do not support the sizes, or shapes, types or devices do not fit.
        RuntimeError: if the GPU is too old.
    """
    check_input(x, "text_key", text_key, heads, resolution, pooling, input_precision)
    C = x.shape[3]
    check_weights(x, weight=(weight, (2 * C, C)), bias=(bias, (2 * C,)))
    check_sums(x, key_value, key_sum, heads, resolution, pooling, may_be_shared=True)
    x = x if x.stride(-1) == 1 and fits_32_bits(x, 2, 3) else x.contiguous()
    return COLLECT.call(
        _class_collect, x, weight, bias, text_key, key_value, key_sum, heads, length, resolution, pooling,
        means, input_precision,
    )  # fmt: skip


def class_apply(
    x: Tensor,
    text_query: Tensor | None,
    means: Tensor,
    key_sum: Tensor,
    q: Tensor,
    q_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    heads: int,
    length: int,
    eps: float,
    resolution: Sequence[int],
    pooling: Sequence[int] = (1, 1),
    input_precision: str = "ieee",
    out: Tensor | None = None,
) -> Tensor:
    """Class attention from sums over all classes, MLP, and both residuals.

    Args:
        x, heads, length, resolution, pooling: as in `class_collect`.
        text_query: the part of the queries that comes from the text guidance, `[B or 1, t, C]`, or None.
        means: of values, `[B, hw, heads, d, d]` in the type of x, contiguous.
        key_sum: the sums of keys, `[B, hw, heads, d]` in fp32.
        q, q_bias, fc1, fc1_bias, fc2, fc2_bias: `[C, C]`, `[C]`, `[M, C]`, `[M]`, `[C, M]` and `[C]`.
        eps: added to the sum of the weights.
        input_precision: precision of products of fp32 numbers: "ieee", "tf32x3" or "tf32".
        out: tensor for the result, with the shape and type of x and dense positions, but any strides over B
            and t; it may be x. By default a new, contiguous tensor.

    Returns:
        `[B, t, HW, C]`: `out`, or the new tensor.

    Raises:
        ValueError: as in `class_collect`.
        RuntimeError: if the GPU is too old.
    """
    check_input(x, "text_query", text_query, heads, resolution, pooling, input_precision)
    C, M = x.shape[3], len(fc1)
    check_weights(
        x, q=(q, (C, C)), q_bias=(q_bias, (C,)), fc1=(fc1, (M, C)), fc1_bias=(fc1_bias, (M,)),
        fc2=(fc2, (C, M)), fc2_bias=(fc2_bias, (C,)),
    )  # fmt: skip
    d, positions = C // heads, pooled_positions(resolution, pooling)
    check_weights(x, means=(means, (len(x), positions, heads, d, d)))
    check_sums(x, None, key_sum, heads, resolution, pooling, may_be_shared=False)
    x = x if x.stride(-1) == 1 and fits_32_bits(x, 2, 3) else x.contiguous()
    arguments = (
        x, text_query, means, key_sum, q, q_bias, fc1, fc1_bias, fc2, fc2_bias,
        heads, length, eps, resolution, pooling, input_precision,
    )  # fmt: skip
    if out is None:
        return APPLY.call(_class_apply, *arguments)
    check_destination("out", out, x)
    APPLY.call(_class_apply_into, *arguments, out=out)
    return out


@torch.library.custom_op("catseg_fast::class_collect", mutates_args=())
def _class_collect(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    text_key: Tensor | None,
    key_value: Tensor | None,
    key_sum: Tensor | None,
    heads: int,
    length: int,
    resolution: Sequence[int],
    pooling: Sequence[int],
    means: bool,
    input_precision: str,
) -> tuple[Tensor, Tensor]:
    sums: tuple[Tensor, Tensor] = COLLECT.launch(
        x, weight, bias, text_key, key_value, key_sum, heads, length, resolution, pooling, means,
        input_precision,
    )  # fmt: skip
    return sums


@_class_collect.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, heads, _, resolution, pooling, means, _ = rest
    shape, d = (len(x), pooled_positions(resolution, pooling), heads), x.shape[-1] // heads
    return (
        x.new_empty((*shape, d, d), dtype=x.dtype if means else torch.float32),
        x.new_empty((*shape, d), dtype=torch.float32),
    )


@torch.library.custom_op("catseg_fast::class_apply", mutates_args=())
def _class_apply(
    x: Tensor,
    text_query: Tensor | None,
    means: Tensor,
    key_sum: Tensor,
    q: Tensor,
    q_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    heads: int,
    length: int,
    eps: float,
    resolution: Sequence[int],
    pooling: Sequence[int],
    input_precision: str,
) -> Tensor:
    out: Tensor = APPLY.launch(
        x, text_query, means, key_sum, q, q_bias, fc1, fc1_bias, fc2, fc2_bias,
        heads, length, eps, resolution, pooling, input_precision,
    )  # fmt: skip
    return out


@_class_apply.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("catseg_fast::class_apply_into", mutates_args=("out",))
def _class_apply_into(
    out: Tensor,
    x: Tensor,
    text_query: Tensor | None,
    means: Tensor,
    key_sum: Tensor,
    q: Tensor,
    q_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    heads: int,
    length: int,
    eps: float,
    resolution: Sequence[int],
    pooling: Sequence[int],
    input_precision: str,
) -> None:
    APPLY.launch(
        x, text_query, means, key_sum, q, q_bias, fc1, fc1_bias, fc2, fc2_bias,
        heads, length, eps, resolution, pooling, input_precision, out=out,
    )  # fmt: skip


@_class_apply_into.register_fake
def _(*_: Any) -> None:
    return None


def _launch_collect(*arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, input_precision = arguments
    sums: tuple[Tensor, Tensor] = collect.KERNEL(*rest, input_precision=input_precision)
    return sums


def _launch_apply(*arguments: Any, out: Tensor | None = None) -> Tensor:
    *rest, input_precision = arguments
    result: Tensor = apply.KERNEL(*rest, input_precision=input_precision, out=out)
    return result


def _collect_inputs(sizes: Sizes, random: Random) -> dict[str, Any]:
    (B, t, _, C), heads, d = sizes.state, sizes.heads, sizes.channels // sizes.heads
    shape = (B, pooled_positions(sizes.resolution, sizes.pooling), heads)
    return {
        "x": random.normal(*sizes.state),
        "weight": random.weight(2 * C, C),
        "bias": random.bias(2 * C),
        "text_key": random.normal(B if sizes.guided else 1, t, C),
        # In a stream, the sums of an earlier chunk with one class.
        "key_value": random.uniform(*shape, d, d) / t if sizes.streamed else None,
        "key_sum": random.uniform(*shape, d) if sizes.streamed else None,
        "heads": heads,
        "length": t,
        "resolution": sizes.resolution,
        "pooling": sizes.pooling,
        "means": not sizes.streamed,
    }


def _apply_inputs(sizes: Sizes, random: Random) -> dict[str, Any]:
    (B, t, _, C), M, heads, d = sizes.state, sizes.hidden, sizes.heads, sizes.channels // sizes.heads
    shape = (B, pooled_positions(sizes.resolution, sizes.pooling), heads)
    return {
        "x": random.normal(*sizes.state),
        "text_query": random.normal(B if sizes.guided else 1, t, C),
        # Sums of t keys of about one.
        "means": random.normal(*shape, d, d, scale=t**-0.5),
        "key_sum": t * (0.5 + random.uniform(*shape, d)),
        "q": random.weight(C, C),
        "q_bias": random.bias(C),
        "fc1": random.weight(M, C),
        "fc1_bias": random.bias(M),
        "fc2": random.weight(C, M),
        "fc2_bias": random.bias(C),
        "heads": heads,
        "length": t,
        "eps": 1e-6,
        "resolution": sizes.resolution,
        "pooling": sizes.pooling,
    }


ODD = (
    Sizes(1, 1, 2, 3, channels=16, heads=1, hidden=17, guided=False),
    Sizes(2, 7, 3, 3, channels=48, heads=3, hidden=80, streamed=True),
    Sizes(1, 33, 4, 3, channels=160, heads=5, hidden=96, guided=False),
    Sizes(2, 3, 7, 8, channels=64, heads=4, hidden=64, pooling=(2, 3), streamed=True),
)

COLLECT = Op(
    name="class_collect",
    plain=plain.class_collect,
    triton=class_collect,
    forms=(Form(_launch_collect),),
    make_inputs=_collect_inputs,
    sizes={"": Sizes(classes=204, guided=False)},
    special={
        "streamed": Sizes(classes=204, guided=False, streamed=True),
        "pooled": Sizes(guided=False, pooling=(2, 2)),
    },
    odd=ODD,
    mma={"collect_kernel": "mma"},
)

APPLY = Op(
    name="class_apply",
    plain=plain.class_apply,
    triton=class_apply,
    forms=(Form(_launch_apply),),
    make_inputs=_apply_inputs,
    sizes={"": Sizes(classes=204, guided=False)},
    special={
        "whole tiles": Sizes(classes=256, guided=False),
        "pooled": Sizes(classes=204, guided=False, pooling=(2, 2)),
    },
    odd=ODD,
    mma={"apply_kernel": "wgmma"},
)
