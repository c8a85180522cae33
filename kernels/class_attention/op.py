"""Linear attention over classes: the Triton counterparts of `stages.class_collect` and `stages.class_apply`.

This is where arguments are checked, and where the tuner finds both; the kernels are in `class_collect.py` and
`class_apply.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from catseg_fast.engine.class_memory import ClassMemory, LinearMemory
from catseg_fast.engine.folding import ClassLayer
from catseg_fast.kernels.class_attention import apply as apply_op
from catseg_fast.kernels.class_attention import collect as collect_op
from catseg_fast.kernels.launch.checks import check_like, check_runnable
from catseg_fast.kernels.launch.tunable import Tunable, Workload

MAX_CHANNELS = 256


def unsupported(layer: ClassLayer) -> str | None:
    """Why the kernels cannot run a layer, so that it falls back to `stages`; None if they can."""
    C = layer.q.shape[0]
    if not layer.linear:
        return "softmax attention over classes has no kernel"
    if C % 16 or C > MAX_CHANNELS:
        return f"class attention of {C} channels has no kernel: not a multiple of 16 up to {MAX_CHANNELS}"
    return None


def class_collect(
    layer: ClassLayer,
    memory: ClassMemory,
    x: Tensor,
    text_key: Tensor | None,
    resolution: tuple[int, int],
    input_precision: str = "ieee",
) -> None:
    """Add the keys and values of a chunk to the memory of all classes.

    Args:
        layer: folded weights, in the type of `x`.
        memory: a `LinearMemory`; its sums become new tensors, the old ones are left as they are.
        x: `[B, t, HW, C]`, fp16, bf16 or fp32; any strides as long as channels lie one behind the other.
        text_key: the text guidance's share of the keys, `[B or 1, t, C]`, or None.
        resolution: (H, W).
        input_precision: of products of fp32 numbers: "ieee" or "tf32"; here, "tf32x3" means "ieee".

    Raises:
        ValueError: for what the kernels do not support, and for shapes, types or devices that do not fit.
        RuntimeError: if the GPU is too old.
    """
    memory = _check(layer, memory, x, "text_key", text_key, resolution, input_precision)
    memory.key_value, memory.key_sum = collect_op.class_collect(
        _dense(x),
        layer.kv,
        layer.kv_bias,
        text_key,
        *_sums(layer, memory, x, resolution),
        memory.heads,
        memory.length,
        resolution,
        layer.pooling or (1, 1),
        input_precision,
    )


def class_apply(
    layer: ClassLayer,
    x: Tensor,
    text_query: Tensor | None,
    memory: ClassMemory,
    resolution: tuple[int, int],
    input_precision: str = "ieee",
) -> Tensor:
    """Class attention from the memory of all classes, MLP, and both residuals.

    Args:
        layer, x, resolution: as in `class_collect`.
        text_query: the text guidance's share of the queries, `[B or 1, t, C]`, or None.
        memory: a `LinearMemory` of the same crops.
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Returns:
        `[B, t, HW, C]`, contiguous.

    Raises:
        ValueError: as in `class_collect`; also if nothing was added to the memory.
        RuntimeError: if the GPU is too old.
    """
    memory = _check(layer, memory, x, "text_query", text_query, resolution, input_precision)
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
        input_precision,
    )
    return out


def tunables(workload: Workload) -> list[Tunable]:
    """Both kernels, without pooling."""
    return [_tunable_collect(workload), _tunable_apply(workload)]


def _tunable_collect(workload: Workload) -> Tunable:
    w, (B, t, HW, C), heads = workload, workload.state, workload.heads
    d = C // heads

    def make_inputs(device: torch.device) -> tuple[Tensor, ...]:
        x, text_key = w.normal(device, *w.state), w.normal(device, 1, t, C)
        # The sums of an earlier chunk.
        key_value = torch.randn(B, HW, heads, d, d, device=device)
        key_sum = torch.rand(B, HW, heads, d, device=device)
        return x, *w.layers(device, (2 * C, C)), text_key, key_value, key_sum

    def run(inputs: Sequence[Tensor], config: collect_op.CollectConfig) -> Sequence[Tensor]:
        x, weight, bias, text_key, key_value, key_sum = inputs
        sizes = (heads, t, (w.height, w.width), (1, 1))
        return collect_op.launch(
            x, weight, bias, text_key, key_value, key_sum, *sizes, w.input_precision, config
        )

    wanted = collect_op.problem(w.dtype, w.input_precision, w.crop_classes, HW, C, heads, pooled=1)
    return Tunable(wanted, collect_op.candidates(w.dtype), make_inputs, run)


def _tunable_apply(workload: Workload) -> Tunable:
    w, (B, t, HW, C), heads, M = workload, workload.state, workload.heads, workload.hidden
    d = C // heads

    def make_inputs(device: torch.device) -> tuple[Tensor, ...]:
        x, text_query = w.normal(device, *w.state), w.normal(device, 1, t, C)
        # Of t keys around one; values are divided by t.
        key_value = torch.randn(B, HW, heads, d, d, device=device)
        key_sum = t * (0.5 + torch.rand(B, HW, heads, d, device=device))
        return x, text_query, key_value, key_sum, *w.layers(device, (C, C), (M, C), (C, M))

    def run(inputs: Sequence[Tensor], config: apply_op.ApplyConfig) -> Sequence[Tensor]:
        x, text_query, key_value, key_sum, q, q_bias, fc1, fc1_bias, fc2, fc2_bias = inputs
        weights = (q, q_bias, fc1, fc1_bias, fc2, fc2_bias)
        sizes = (heads, t, 1e-6, (w.height, w.width), (1, 1))
        return (
            apply_op.launch(x, text_query, key_value, key_sum, *weights, *sizes, w.input_precision, config),
        )

    wanted = apply_op.problem(w.dtype, w.input_precision, w.crop_classes, HW, C, heads, M, pooled=1)
    configs = apply_op.candidates(w.capability, w.dtype, w.input_precision, t)
    return Tunable(wanted, configs, make_inputs, run)


def _check(
    layer: ClassLayer,
    memory: ClassMemory,
    x: Tensor,
    text_name: str,
    text: Tensor | None,
    resolution: tuple[int, int],
    input_precision: str,
) -> LinearMemory:
    if reason := unsupported(layer):
        raise ValueError(f"layer: {reason}")
    if not isinstance(memory, LinearMemory):
        raise ValueError(f"memory: {type(memory).__name__} has no kernel, LinearMemory has")
    check_runnable("x", x, input_precision)
    (H, W), C = resolution, layer.q.shape[0]
    if x.ndim != 4 or 0 in x.shape or x.shape[2:] != (H * W, C):
        wanted = f"[B, t, {H * W}, {C}] for resolution {H}x{W}, with B and t above 0"
        raise ValueError(f"x: has shape {list(x.shape)}; wanted {wanted}")
    if text is not None:
        check_like(text_name, text, ((1, x.shape[0]), x.shape[1], C), x)
        if text.stride(-1) != 1:
            raise ValueError(
                f"{text_name}: has strides {text.stride()}; wanted channels one behind the other"
            )
    M = layer.fc1.shape[0]
    shapes = {"q": (C, C), "q_bias": (C,), "kv": (2 * C, C), "kv_bias": (2 * C,)}
    shapes |= {"fc1": (M, C), "fc1_bias": (M,), "fc2": (C, M), "fc2_bias": (C,)}
    for name, shape in shapes.items():
        weight = getattr(layer, name)
        check_like(f"layer.{name}", weight, shape, x)
        if not weight.is_contiguous():
            raise ValueError(f"layer.{name}: has strides {weight.stride()}; wanted a contiguous tensor")
    pool_h, pool_w = layer.pooling or (1, 1)
    if pool_h > H or pool_w > W:
        raise ValueError(f"layer.pooling: {pool_h}x{pool_w} is larger than the resolution {H}x{W}")
    return memory


def _sums(
    layer: ClassLayer, memory: LinearMemory, x: Tensor, resolution: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """The memory's sums for `x`: of each position, of the padding, or None where there is nothing yet."""
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
        raise ValueError(f"memory.{name}: has shape {list(sums.shape)}; wanted {list(wanted)}")
    if (sums.dtype, sums.device) != (torch.float32, x.device) or not sums.is_contiguous():
        raise ValueError(
            f"memory.{name}: is {sums.dtype} on {sums.device} with strides {sums.stride()}; "
            f"wanted a contiguous torch.float32 on {x.device}"
        )
    return sums


def _dense(x: Tensor) -> Tensor:
    """`x` with its channels one behind the other; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
