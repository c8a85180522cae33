"""Linear attention over classes: the Triton counterparts of `stages.class_collect` and `stages.class_apply`.

This is where arguments are checked; the kernels are in `class_collect.py` and `class_apply.py`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from catseg_fast.class_memory import ClassMemory, LinearMemory
from catseg_fast.kernels import class_apply as apply_op
from catseg_fast.kernels import class_collect as collect_op
from catseg_fast.plan import ClassLayer

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 256
INTERPRETED = not isinstance(collect_op._collect_kernel, triton.JITFunction)


def unsupported(layer: ClassLayer) -> str | None:
    """Why the kernels cannot run a layer, for a fall-back to `stages`; None if they can."""
    C = layer.q.shape[0]
    if not layer.linear:
        return "softmax attention over classes has no kernel"
    if layer.q.dtype not in DTYPES:
        return f"class attention in {layer.q.dtype} has no kernel"
    if C % 16 or C > MAX_CHANNELS:
        return f"class attention of {C} channels has no kernel: not a multiple of 16 up to {MAX_CHANNELS}"
    return None


def class_collect(
    layer: ClassLayer,
    memory: ClassMemory,
    x: Tensor,
    text_key: Tensor | None,
    resolution: tuple[int, int],
    *,
    precision: str = "ieee",
) -> None:
    """Add the keys and values of a chunk to the memory of all classes (DESIGN: "class pass 1").

    Args:
        layer: folded weights, in the type of `x`.
        memory: a `LinearMemory`; its sums become new tensors, the old ones are left as they are.
        x: `[B, t, HW, C]`, fp16, bf16 or fp32; any strides as long as channels lie one behind the other.
        text_key: the text guidance's share of the keys, `[B or 1, t, C]`, or None.
        resolution: (H, W).
        precision: of fp32 products: "ieee", or "tf32x3" on tensor cores.

    Raises:
        ValueError: for what the kernels do not support (see `unsupported`), and for shapes, types or devices that
            do not fit each other.
    """
    memory = _check(layer, memory, x, "text_key", text_key, resolution, precision)
    key_value, key_sum = _sums(layer, memory, x, resolution)
    memory.key_value, memory.key_sum = collect_op.class_collect(
        _dense(x),
        layer.kv,
        layer.kv_bias,
        text_key,
        key_value,
        key_sum,
        memory.heads,
        memory.length,
        resolution,
        layer.pooling or (1, 1),
        precision,
    )


def class_apply(
    layer: ClassLayer,
    x: Tensor,
    text_query: Tensor | None,
    memory: ClassMemory,
    resolution: tuple[int, int],
    *,
    precision: str = "ieee",
) -> Tensor:
    """Class attention from the memory of all classes, MLP, and both residuals (DESIGN: "class pass 2").

    Args:
        layer, x, resolution, precision: as in `class_collect`.
        text_query: the text guidance's share of the queries, `[B or 1, t, C]`, or None.
        memory: a `LinearMemory` of the same crops.

    Returns:
        `[B, t, HW, C]`, contiguous.

    Raises:
        ValueError: as in `class_collect`; also if nothing was added to the memory.
    """
    memory = _check(layer, memory, x, "text_query", text_query, resolution, precision)
    key_value, key_sum = _sums(layer, memory, x, resolution)
    if key_value is None or key_sum is None or key_sum.ndim == 2:
        raise ValueError("memory: it is empty, no class was added")
    out: Tensor = apply_op.class_apply(
        _dense(x),
        text_query,
        key_value,
        key_sum,
        layer.q,
        layer.q_bias,
        layer.fc1,
        layer.fc1_bias,
        layer.fc2,
        layer.fc2_bias,
        memory.heads,
        memory.length,
        memory.eps,
        resolution,
        layer.pooling or (1, 1),
        precision,
    )
    return out


def _check(
    layer: ClassLayer,
    memory: ClassMemory,
    x: Tensor,
    text_name: str,
    text: Tensor | None,
    resolution: tuple[int, int],
    precision: str,
) -> LinearMemory:
    if reason := unsupported(layer):
        raise ValueError(f"layer: {reason}")
    if not isinstance(memory, LinearMemory):
        raise ValueError(f"memory: {type(memory).__name__} has no kernel, LinearMemory has")
    if not all(weight.is_contiguous() for weight in (layer.q, layer.kv, layer.fc1, layer.fc2)):
        raise ValueError("layer: its weights are not contiguous")
    H, W = resolution
    C = layer.q.shape[0]
    if x.ndim != 4 or 0 in x.shape or x.shape[2:] != (H * W, C):
        raise ValueError(f"x: shape {tuple(x.shape)} is not [B, t, {H * W}, {C}] (resolution {H}x{W}), all above 0")
    if text is not None and (text.shape[1:] != (x.shape[1], C) or text.shape[0] not in (1, x.shape[0])):
        wanted = f"[{x.shape[0]} or 1, {x.shape[1]}, {C}]"
        raise ValueError(f"{text_name}: shape {tuple(text.shape)} is not {wanted}, as x {tuple(x.shape)} wants")
    if text is not None and text.stride(-1) != 1:
        raise ValueError(f"{text_name}: strides {text.stride()} do not end in 1")
    pool_h, pool_w = layer.pooling or (1, 1)
    if pool_h > H or pool_w > W:
        raise ValueError(f"layer: pooling {pool_h}x{pool_w} is larger than the resolution {H}x{W}")
    if precision not in ("ieee", "tf32x3"):
        raise ValueError(f"precision: {precision!r} is not 'ieee' or 'tf32x3'")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f"x: is on {x.device}, Triton's kernels run on CUDA")
    for name, other in (("layer", layer.q), (text_name, text)):
        if other is not None and (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(
                f"{name}: {other.dtype} on {other.device} differs from x, {x.dtype} on {x.device}"
            )
    return memory


def _sums(
    layer: ClassLayer, memory: LinearMemory, x: Tensor, resolution: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """The memory's sums for `x`: those of each position, the padding's alone, or None where there is nothing yet."""
    pool_h, pool_w = layer.pooling or (1, 1)
    tokens = (resolution[0] // pool_h) * (resolution[1] // pool_w)
    heads, d = memory.heads, x.shape[-1] // memory.heads
    return (
        _check_sum("key_value", memory.key_value, x, tokens, (heads, d, d)),
        _check_sum("key_sum", memory.key_sum, x, tokens, (heads, d)),
    )


def _check_sum(
    name: str, sums: Tensor | float, x: Tensor, tokens: int, shape: tuple[int, ...]
) -> Tensor | None:
    if not isinstance(sums, Tensor):
        return None
    wanted = (x.shape[0], tokens, *shape)
    if sums.shape not in (wanted, shape):
        raise ValueError(f"memory: {name} has shape {tuple(sums.shape)}, x {tuple(x.shape)} wants {wanted}")
    if (sums.dtype, sums.device) != (torch.float32, x.device) or not sums.is_contiguous():
        raise ValueError(
            f"memory: {name} is {sums.dtype} on {sums.device} with strides {sums.stride()}, "
            f"not contiguous torch.float32 on {x.device}"
        )
    return sums


def _dense(x: Tensor) -> Tensor:
    """`x` with its channels one behind the other; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
