"""Guided shifted-window attention block (CAT-Seg paper, section 3.3): window attention and MLP, each with
residual.

For x `[B, t, HW, C]` (B crops, t classes, C channels in `heads` heads of d), windows of N tokens and norm
without affine part:

    q, k, v = norm(x) W^T + (g_q, g_k, 0)                      g: the image's guidance, the same for every class
    a = softmax(q k^T - 100 * [other region of the image]) v   within a window, by head
    y = x + a W_p^T + b_p
    out = y + MLP(norm(y))

Three kernels: (1) norm, projection and guidance, from image order to window order; (2) attention, its result in
the place of the queries; (3) the rest, back to image order (`mlp.py`). Cyclic shift, window partition and region
mask are index arithmetic. Between the kernels there is one buffer `[B, t, HW, 3C]`; never materialised are the
rolled or partitioned x, `[x ; guidance]` `[B, t, HW, C + G]`, the mask `[windows, N, N]`, the scores
`[B * t * windows, heads, N, N]`, and what `mlp.py` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels import mlp
from catseg_fast.kernels.checks import DTYPES, check_like, check_runnable
from catseg_fast.kernels.class_tokens import normalise
from catseg_fast.kernels.compile_target import CompileTarget, capability_of
from catseg_fast.kernels.windows import Windows, token_position, token_region
from catseg_fast.plan import WindowBlock
from catseg_fast.reference.window_attention import MASKED, fit_window
from catseg_fast.terms import BlockGuidance

MAX_CHANNELS = 256
MAX_WINDOW = 24
LOG2E = tl.constexpr(1.4426950408889634)
PENALTY = tl.constexpr(MASKED)


@dataclass(frozen=True)
class QKVConfig:
    """Launch config: tokens and classes a program, and its channels of each of q, k and v."""

    rows: int
    channels: int
    classes: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """Launch config: queries a step."""

    queries: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """Launch configs of the three kernels."""

    qkv: QKVConfig
    attention: AttentionConfig
    mlp: mlp.MLPConfig


@triton.jit(do_not_specialize=["classes"])
def qkv_kernel(
    x_ptr,  # [B, t, HW, C], image order, strided over B and t
    weight_ptr,  # [3C, C]
    guidance_ptr,  # [B or 1, HW or 1, 2C], window order, strided over the first two
    qkv_ptr,  # [B, t, HW, 3C], window order
    classes,  # t
    x_stride_b,
    x_stride_t,
    guidance_stride_b,
    guidance_stride_n,
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same tokens and channels of q, k and v for CLASSES classes: weight and guidance are loaded once."""
    dtype = qkv_ptr.dtype.element_ty
    groups = tl.cdiv(classes, CLASSES)
    b = (tl.program_id(2) // groups).to(tl.int64)
    first = (tl.program_id(2) % groups * CLASSES).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    c = tl.arange(0, BLOCK_C)
    valid = (row < H * W)[:, None]
    mask = valid & (channel < C)[None, :]

    mask_weight = (c < C)[:, None] & (channel < C)[None, :]
    weight_ptr += channel[None, :] * C + c[:, None]
    weight_q = tl.load(weight_ptr, mask_weight, 0.0)
    weight_k = tl.load(weight_ptr + C * C, mask_weight, 0.0)
    weight_v = tl.load(weight_ptr + 2 * C * C, mask_weight, 0.0)
    guidance_ptr += b * guidance_stride_b + row[:, None] * guidance_stride_n + channel[None, :]
    guidance_q = tl.load(guidance_ptr, mask, 0.0)
    guidance_k = tl.load(guidance_ptr + C, mask, 0.0)

    x_ptr += b * x_stride_b + token_position(row, H, W, WINDOW, SHIFT)[:, None] * C + c[None, :]
    qkv_ptr += b * classes * (H * W * 3 * C) + row[:, None] * (3 * C) + channel[None, :]
    last = first + 1 if CLASSES == 1 else tl.minimum(first + CLASSES, classes)
    for i in range(first, last):
        x = tl.load(x_ptr + i * x_stride_t, valid & (c < C)[None, :], 0.0).to(tl.float32)
        x = normalise(x, C, BLOCK_C).to(dtype)
        q = tl.dot(x, weight_q, input_precision=PRECISION) + guidance_q.to(tl.float32)
        k = tl.dot(x, weight_k, input_precision=PRECISION) + guidance_k.to(tl.float32)
        v = tl.dot(x, weight_v, input_precision=PRECISION)
        p_qkv = qkv_ptr + i * (H * W * 3 * C)
        tl.store(p_qkv, q.to(dtype), mask)
        tl.store(p_qkv + C, k.to(dtype), mask)
        tl.store(p_qkv + 2 * C, v.to(dtype), mask)


@triton.jit
def attention_kernel(
    qkv_ptr,  # [B, t, HW, 3C], window order; the attended values replace the queries
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One window and head. Its N keys stay on the chip in two parts, KEYS and then at most REST."""
    dtype = qkv_ptr.dtype.element_ty
    N: tl.constexpr = WINDOW * WINDOW
    C: tl.constexpr = HEADS * D
    window = tl.program_id(0) // HEADS
    qkv_ptr += window.to(tl.int64) * (N * 3 * C) + tl.program_id(0) % HEADS * D
    down, across = window // (W // WINDOW) % (H // WINDOW), window % (W // WINDOW)
    last_row, last_column = down == H // WINDOW - 1, across == W // WINDOW - 1

    d = tl.arange(0, BLOCK_D)[None, :]
    n = tl.arange(0, KEYS)
    r = KEYS + tl.arange(0, REST)
    region_n = token_region(n, last_row, last_column, WINDOW, SHIFT)
    region_r = token_region(r, last_row, last_column, WINDOW, SHIFT)
    valid_n, valid_r = (n < N)[:, None] & (d < D), (r < N)[:, None] & (d < D)
    key_n = tl.load(qkv_ptr + n[:, None] * (3 * C) + C + d, valid_n, 0.0)
    key_r = tl.load(qkv_ptr + r[:, None] * (3 * C) + C + d, valid_r, 0.0)
    value_n = tl.load(qkv_ptr + n[:, None] * (3 * C) + 2 * C + d, valid_n, 0.0)
    value_r = tl.load(qkv_ptr + r[:, None] * (3 * C) + 2 * C + d, valid_r, 0.0)
    for start in range(0, N, QUERIES):
        m = start + tl.arange(0, QUERIES)
        valid = (m < N)[:, None] & (d < D)
        query = tl.load(qkv_ptr + m[:, None] * (3 * C) + d, valid, 0.0)
        score_n = tl.dot(query, tl.trans(key_n), input_precision=PRECISION)
        score_r = tl.dot(query, tl.trans(key_r), input_precision=PRECISION)
        if SHIFT > 0:
            region = token_region(m, last_row, last_column, WINDOW, SHIFT)
            score_n += tl.where(region[:, None] == region_n[None, :], 0.0, PENALTY)
            score_r += tl.where(region[:, None] == region_r[None, :], 0.0, PENALTY)
        if KEYS > N:
            score_n = tl.where(n[None, :] < N, score_n, float("-inf"))
        if KEYS + REST > N:
            score_r = tl.where(r[None, :] < N, score_r, float("-inf"))
        highest = tl.maximum(tl.max(score_n, 1), tl.max(score_r, 1)) * LOG2E
        score_n = tl.exp2(score_n * LOG2E - highest[:, None])
        score_r = tl.exp2(score_r * LOG2E - highest[:, None])
        total = tl.sum(score_n, 1) + tl.sum(score_r, 1)
        attended = tl.dot(score_n.to(dtype), value_n, input_precision=PRECISION)
        attended = tl.dot(score_r.to(dtype), value_r, attended, input_precision=PRECISION)
        tl.store(qkv_ptr + m[:, None] * (3 * C) + d, (attended / total[:, None]).to(dtype), valid)


def default_config(capability: int, dtype: torch.dtype, channels: int, heads: int, window: int) -> Config:
    """Configs that fit every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
    if dtype == torch.float32:
        qkv = QKVConfig(rows=32, channels=16, classes=8, num_warps=4, num_stages=1)
    elif channels > 128 or capability in (86, 89):  # the latter have 99 KB of shared memory a program
        qkv = QKVConfig(rows=32, channels=32, classes=8, num_warps=4, num_stages=2)
    else:
        qkv = QKVConfig(rows=64, channels=128, classes=8, num_warps=8, num_stages=2)
    few = dtype != torch.float32 and window <= 16 and channels // heads <= 64
    attention = AttentionConfig(queries=16, num_warps=1 if few else 4, num_stages=1)
    return Config(qkv, attention, mlp.default_config(capability, dtype, channels))


def launch(
    x: Tensor,
    query_key: Tensor,
    qkv: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    windows: Windows,
    heads: int,
    input_precision: str,
    config: Config,
) -> Tensor:
    """`window_block` on tensors; see there for shapes. Nothing is checked."""
    B, t, HW, C = x.shape
    guidance = query_key.expand(B, HW, 2 * C)
    buffer = x.new_empty((B, t, HW, 3 * C))
    c = config.qkv
    qkv_kernel[(triton.cdiv(C, c.channels), triton.cdiv(HW, c.rows), B * triton.cdiv(t, c.classes))](
        x, qkv, guidance, buffer, t, x.stride(0), x.stride(1), guidance.stride(0), guidance.stride(1),
        **_qkv_constants(windows, C, input_precision, c),
        num_warps=c.num_warps, num_stages=c.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    a = config.attention
    attention_kernel[(B * t * (HW // windows.window**2) * heads,)](
        buffer, **_attention_constants(windows, C, heads, input_precision, a),
        num_warps=a.num_warps, num_stages=a.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return mlp.launch(
        x, buffer, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias, windows, input_precision, config.mlp
    )


def _qkv_constants(windows: Windows, C: int, input_precision: str, config: QKVConfig) -> dict[str, Any]:
    return {
        **windows.constants(),
        **{"C": C, "BLOCK_C": triton.next_power_of_2(C), "PRECISION": input_precision},
        **{"ROWS": config.rows, "CHANNELS": config.channels, "CLASSES": config.classes},
    }


def _attention_constants(
    windows: Windows, C: int, heads: int, input_precision: str, config: AttentionConfig
) -> dict[str, Any]:
    # Two powers of two, 16 or more, that hold the N tokens of a window with little to spare: 144 = 128 + 16.
    tokens = windows.window**2
    keys = max(16, triton.next_power_of_2(tokens) // 2)
    rest = max(16, triton.next_power_of_2(tokens - keys))
    return {
        **windows.constants(),
        **{"HEADS": heads, "D": C // heads, "BLOCK_D": max(16, triton.next_power_of_2(C // heads))},
        **{"QUERIES": config.queries, "KEYS": keys, "REST": rest, "PRECISION": input_precision},
    }


# Computes in the type of x and accumulates in fp32; autocast changes nothing.
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
    height: int,
    width: int,
    window: int,
    shift: int,
    heads: int,
    input_precision: str,
) -> Tensor:
    windows = Windows(height, width, window, shift)
    config = default_config(capability_of(x.device), x.dtype, x.shape[3], heads, window)
    return launch(
        x, query_key, qkv, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias, windows, heads, input_precision, config
    )


@_window_block.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def window_block(
    block: WindowBlock, guidance: BlockGuidance, x: Tensor, input_precision: str = "ieee"
) -> Tensor:
    """`stages.window_block` on Triton kernels.

    Args:
        block: the folded weights, in x's type; channels a multiple of 16 up to 256.
        guidance: the image's share, of which `query_key [B or 1, HW or 1, 2C]` and `resolution` are used.
        x: `[B, t, HW, C]`, of at least one class; fp16, bf16 or fp32.
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Returns:
        `[B, t, HW, C]`.

    Raises:
        ValueError: if an argument has a wrong shape, type or device, or a size that the kernels do not have.
        RuntimeError: if the GPU is too old.
    """
    height, width = guidance.resolution
    window, shift = fit_window(guidance.resolution, block.window, block.shift)
    windows = Windows(height, width, window, shift)
    _check(block, guidance, x, windows, input_precision)
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        x = x.contiguous()
    weights = (block.qkv, block.proj, block.proj_bias, block.fc1, block.fc1_bias, block.fc2, block.fc2_bias)
    tensors = (tensor.contiguous() for tensor in (guidance.query_key, *weights))
    return _window_block(x, *tensors, *windows, block.heads, input_precision)


def _check(
    block: WindowBlock, guidance: BlockGuidance, x: Tensor, windows: Windows, input_precision: str
) -> None:
    (height, width, window, _), heads = windows, block.heads
    if x.ndim != 4 or x.shape[2] != height * width or not x.numel():
        raise ValueError(
            f"x: has shape {list(x.shape)}; wanted [B, t, {height * width}, C] with none of them 0, "
            f"for a resolution of {height}x{width}"
        )
    check_runnable("x", x, input_precision)
    (B, t, HW, C), M = x.shape, len(block.fc1)
    if C % 16 or C > MAX_CHANNELS or C % heads:
        raise ValueError(
            f"x: has {C} channels in {heads} heads; wanted a multiple of 16 up to {MAX_CHANNELS}, and of the heads"
        )
    if height % window or width % window or window > MAX_WINDOW:
        raise ValueError(
            f"block: window {window} at resolution {height}x{width}; wanted a divisor up to {MAX_WINDOW}"
        )
    if B * t * HW >= 2**31:
        raise ValueError(f"x: has {B * t * HW} tokens; wanted less than 2**31")
    check_like("guidance.query_key", guidance.query_key, ((1, B), (1, HW), 2 * C), x)
    check_like("block.qkv", block.qkv, (3 * C, C), x)
    check_like("block.proj", block.proj, (C, C), x)
    check_like("block.proj_bias", block.proj_bias, (C,), x)
    check_like("block.fc1", block.fc1, (M, C), x)
    check_like("block.fc1_bias", block.fc1_bias, (M,), x)
    check_like("block.fc2", block.fc2, (C, M), x)
    check_like("block.fc2_bias", block.fc2_bias, (C,), x)


def compile_targets(capability: int) -> list[CompileTarget]:
    """The kernels at the published sizes: C = 128, 4 heads, 24 x 24, window 12, both shifts."""
    C, heads, window, targets = 128, 4, 12, []
    for dtype, precision in [*((dtype, "ieee") for dtype in DTYPES), (torch.float32, "tf32x3")]:
        config, name = default_config(capability, dtype, C, heads, window), DTYPES[dtype]
        mma = None if (name, precision) == ("fp32", "ieee") else "mma"
        strides = ("x_stride_b", "x_stride_t", "guidance_stride_b", "guidance_stride_n")
        targets.append(
            CompileTarget(
                name=f"qkv {name} {precision}",
                kernel=qkv_kernel,
                signature={
                    **dict.fromkeys(("x_ptr", "weight_ptr", "guidance_ptr", "qkv_ptr"), f"*{name}"),
                    **dict.fromkeys(("classes", *strides), "i32"),
                },
                constexprs=_qkv_constants(Windows(24, 24, window, 6), C, precision, config.qkv),
                num_warps=config.qkv.num_warps,
                num_stages=config.qkv.num_stages,
                divisible=strides,
                expects_mma="wgmma" if capability == 90 and name != "fp32" else mma,
            )
        )
        targets += [
            CompileTarget(
                name=f"attention {name} {precision} shift {shift}",
                kernel=attention_kernel,
                signature={"qkv_ptr": f"*{name}"},
                constexprs=_attention_constants(
                    Windows(24, 24, window, shift), C, heads, precision, config.attention
                ),
                num_warps=config.attention.num_warps,
                num_stages=config.attention.num_stages,
                expects_mma=mma,
            )
            for shift in (0, 6)
        ]
    return targets
