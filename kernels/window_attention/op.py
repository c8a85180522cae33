"""Guided shifted-window attention block (CAT-Seg paper, section 3.3): attention and MLP, with residuals.

For x `[B, t, HW, C]` (B crops, t classes, C channels), windows of N tokens, norm without affine parameters:

    q, k, v = norm(x) W^T + (g_q, g_k, 0)
    y = x + softmax(q k^T + mask) v W_p^T + b_p
    out = y + GELU(norm(y) W_1^T + b_1) W_2^T + b_2

There are three kernels: `qkv.py`; `attention.py`, whose result replaces the queries; and `mlp.py`. Tokens
stay in image order throughout. The only buffer between the kernels is one of `[B, t, HW, 3C]`.

The op computes in the type of x and accumulates in fp32, independently of autocast. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels.launch.checks import check_destination, check_like, check_runnable
from catseg_fast.kernels.launch.op import Form, Op, Random, Sizes
from catseg_fast.kernels.window_attention import attention, mlp, plain
from catseg_fast.kernels.window_attention import qkv as projection
from catseg_fast.kernels.window_attention.windows import Windows

MAX_CHANNELS = 256
MAX_WINDOW = 24


def unsupported(channels: int, heads: int, window: int) -> str | None:
    """Return why the kernels cannot run a block of these sizes; None if they can."""
    if channels % 16 or channels > MAX_CHANNELS or channels % heads:
        expected = f"a multiple of 16 up to {MAX_CHANNELS}, and of the heads"
        return f"{channels} channels in {heads} heads; expected {expected}"
    if window > MAX_WINDOW:
        return f"a window of {window}; expected at most {MAX_WINDOW}"
    return None


def window_block(
    x: Tensor,
    query_key: Tensor,
    qkv: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    resolution: Sequence[int],
    window: int,
    shift: int,
    heads: int,
    input_precision: str = "ieee",
    out: Tensor | None = None,
) -> Tensor:
    """Compute the block with Triton kernels.

    Args:
        x: `[B, t, HW, C]`, of at least one class; fp16, bf16 or fp32, with any strides; C is a multiple of
            16, and at most 256.
        query_key: the guidance's part of queries and keys, plus their biases, `[B or 1, HW or 1, 2C]`.
        qkv: `[3C, C]`; the weight of the queries includes the attention scale.
        proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias: `[C, C]`, `[C]`, `[M, C]`, `[M]`, `[C, M]` and `[C]`.
        resolution: (H, W).
        window: side of a window, which divides H and W.
        shift: positions by which the image is shifted, in [0, window).
        heads: attention heads.
        input_precision: precision of products of fp32 numbers: "ieee", "tf32x3" or "tf32".
        out: tensor for the result, with the shape and type of x and dense positions, but any strides over B
            and t; it may be x. By default a new, contiguous tensor.

    Returns:
        `[B, t, HW, C]`: `out`, or the new tensor.

    Raises:
        ValueError: if an argument has a wrong shape, type or device, or an unsupported size.
        RuntimeError: if the GPU is too old.
    """
    weights = {"qkv": qkv, "proj": proj, "proj_bias": proj_bias, "fc1": fc1, "fc1_bias": fc1_bias}
    weights |= {"fc2": fc2, "fc2_bias": fc2_bias}
    _check(x, query_key, weights, resolution, window, shift, heads, input_precision)
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        x = x.contiguous()
    tensors = [tensor.contiguous() for tensor in (query_key, *weights.values())]
    arguments = (x, *tensors, resolution, window, shift, heads, input_precision)
    if out is None:
        return OP.call(_window_block, *arguments)
    check_destination("out", out, x)
    OP.call(_window_block_into, *arguments, out=out)
    return out


@torch.library.custom_op("catseg_fast::window_block", mutates_args=())
def _window_block(
    x: Tensor,
    query_key: Tensor,
    qkv: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    resolution: Sequence[int],
    window: int,
    shift: int,
    heads: int,
    input_precision: str,
) -> Tensor:
    weights = (qkv, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias)
    out: Tensor = OP.launch(x, query_key, *weights, resolution, window, shift, heads, input_precision)
    return out


@_window_block.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("catseg_fast::window_block_into", mutates_args=("out",))
def _window_block_into(
    out: Tensor,
    x: Tensor,
    query_key: Tensor,
    qkv: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    resolution: Sequence[int],
    window: int,
    shift: int,
    heads: int,
    input_precision: str,
) -> None:
    weights = (qkv, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias)
    OP.launch(x, query_key, *weights, resolution, window, shift, heads, input_precision, out=out)


@_window_block_into.register_fake
def _(*_: object) -> None:
    return None


def _launch(x: Tensor, query_key: Tensor, qkv: Tensor, *rest: Any, out: Tensor | None = None) -> Tensor:
    *weights, (height, width), window, shift, heads, input_precision = rest
    windows = Windows(height, width, window, shift)
    buffer = projection.KERNEL(x, qkv, query_key, input_precision=input_precision)
    attention.KERNEL(buffer, windows, heads, input_precision=input_precision)
    result: Tensor = mlp.KERNEL(x, buffer, tuple(weights), input_precision=input_precision, out=out)
    return result


def _check(
    x: Tensor,
    query_key: Tensor,
    weights: dict[str, Tensor],
    resolution: Sequence[int],
    window: int,
    shift: int,
    heads: int,
    input_precision: str,
) -> None:
    height, width = resolution
    if x.ndim != 4 or x.shape[2] != height * width or not x.numel():
        raise ValueError(
            f"x: has shape {list(x.shape)}; expected [B, t, {height * width}, C], not empty, "
            f"for a resolution of {height}x{width}"
        )
    check_runnable("x", x, input_precision)
    (B, t, HW, C), M = x.shape, len(weights["fc1"])
    if reason := unsupported(C, heads, window):
        raise ValueError(f"x, heads, window: {reason}")
    if height % window or width % window:
        raise ValueError(f"window: {window} does not divide the resolution {height}x{width}")
    if not 0 <= shift < window:
        raise ValueError(f"shift: {shift} is not in [0, {window}), for a window of {window}")
    if B * t * HW >= 2**31:
        raise ValueError(f"x: has {B * t * HW} tokens; expected less than 2**31")
    shapes = {"qkv": (3 * C, C), "proj": (C, C), "proj_bias": (C,), "fc1": (M, C), "fc1_bias": (M,)}
    shapes |= {"fc2": (C, M), "fc2_bias": (C,)}
    for name, shape in shapes.items():
        check_like(name, weights[name], shape, x)
    check_like("query_key", query_key, ((1, B), (1, HW), 2 * C), x)


def _make_inputs(sizes: Sizes, random: Random) -> dict[str, Any]:
    C, M, d = sizes.channels, sizes.hidden, sizes.channels // sizes.heads
    qkv = random.weight(3 * C, C)
    qkv[:C] *= d**-0.5
    return {
        "x": random.normal(*sizes.state),
        "query_key": random.normal(*((sizes.crops, sizes.positions) if sizes.guided else (1, 1)), 2 * C),
        "qkv": qkv,
        "proj": random.weight(C, C),
        "proj_bias": random.bias(C),
        "fc1": random.weight(M, C),
        "fc1_bias": random.bias(M),
        "fc2": random.weight(C, M),
        "fc2_bias": random.bias(C),
        "resolution": sizes.resolution,
        "window": sizes.window,
        "shift": sizes.shift,
        "heads": sizes.heads,
    }


OP = Op(
    name="window_block",
    plain=plain.window_block,
    triton=window_block,
    forms=(Form(_launch),),
    make_inputs=_make_inputs,
    sizes={"shifted": Sizes(shift=6), "": Sizes()},
    odd=(
        Sizes(1, 1, 8, 12, channels=16, heads=1, window=4, shift=1, hidden=17, guided=False),
        Sizes(2, 3, 6, 9, channels=48, heads=3, window=3, hidden=100),
        Sizes(1, 33, 12, 12, channels=96, heads=2, window=12, hidden=64, guided=False),
        Sizes(2, 7, 14, 7, channels=144, heads=6, window=7, shift=3, hidden=80),
    ),
    mma={"qkv_kernel": "wgmma", "attention_kernel": "mma", "project_mlp_kernel": "wgmma"},
    max_stack={"project_mlp_kernel": 64},  # lets three programs fit on a multiprocessor
)
