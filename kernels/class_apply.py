"""Second pass of the linear attention over classes, the MLP, and both residuals.

With phi(x) = elu(x) + 1, the sums of `class_collect`, and `length` classes (padding included):

    q = phi(W_q LN(x) + b_q + text_query)
    y = x + sum_j p_j (key_value_j length / key_sum_j),  p_j = q_j key_sum_j / (q key_sum + eps)    for each head
    out = x + y + W_2 relu(W_1 LN(y) + b_1) + b_2

x and out are `[B, t, HW, C]`. Both factors of y stay in fp16's range whatever the keys are: p_j are shares
of one, and what they weigh are means of values. Queries, shares, y and the hidden layer never reach memory. With pooling (h, w) the
tokens are averages of h x w positions, taken while x is read, y and the MLP are on the pooled grid, and a second
kernel adds the bilinear interpolation (corners aligned) of what they give to x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.class_tokens import feature_map, load_matrix, load_tokens, normalise
from catseg_fast.kernels.compile_target import CompileTarget, capability_of


@triton.jit(do_not_specialize=["classes", "tokens"])
def _apply_kernel(
    x_ptr,  # [B, t, HW, C]
    text_ptr,  # [B or 1, t, C], or None
    key_value_ptr,  # [B, hw, heads, d, d] fp32
    key_sum_ptr,  # [B, hw, heads, d] fp32
    q_ptr,  # [C, C]
    q_bias_ptr,  # [C]
    fc1_ptr,  # [M, C]
    fc1_bias_ptr,  # [M]
    fc2_ptr,  # [C, M]
    fc2_bias_ptr,  # [C]
    out_ptr,  # [B, t, hw, C], output, contiguous; without the outer residual where there is pooling
    classes,  # t
    tokens,  # B * hw
    inverse_length,
    eps,
    x_stride_b,
    x_stride_t,
    x_stride_p,
    text_stride_b,
    text_stride_t,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    HIDDEN: tl.constexpr,  # M
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    PRECISION: tl.constexpr,
    POSITIONS: tl.constexpr,  # positions a program
    CLASSES: tl.constexpr,  # classes of each position
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, rounded up
    BLOCK_H: tl.constexpr,  # hidden channels a step
):
    D: tl.constexpr = C // HEADS
    HW: tl.constexpr = (HEIGHT // POOL_H) * (WIDTH // POOL_W)
    dtype = x_ptr.dtype.element_ty
    parts = tl.cdiv(classes, CLASSES)
    first = tl.program_id(0) // parts * POSITIONS

    row = tl.arange(0, POSITIONS * CLASSES)
    token = first + row // CLASSES
    b, p = (token // HW).to(tl.int64), token % HW
    o_t = tl.program_id(0) % parts * CLASSES + row % CLASSES
    m_row = (o_t < classes) & (token < tokens)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    EVEN: tl.constexpr = C == BLOCK_C
    m = m_row[:, None] if EVEN else m_row[:, None] & m_c[None, :]

    p_x = x_ptr + b * x_stride_b + o_t.to(tl.int64) * x_stride_t
    x = load_tokens(p_x, p, m_row, x_stride_p, C, BLOCK_C, WIDTH, POOL_H, POOL_W)
    normalised = normalise(x, C, BLOCK_C).to(dtype)
    y = x
    for head in range(0, HEADS):
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        channel = head * D + o_d
        w_q = load_matrix(q_ptr, channel, o_c, C, C, C, EVEN and D == BLOCK_D)
        q = tl.dot(normalised, tl.trans(w_q), input_precision=PRECISION)
        q += tl.load(q_bias_ptr + channel, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if text_ptr is not None:
            p_text = text_ptr + b * text_stride_b + o_t.to(tl.int64) * text_stride_t
            m_text = m_row[:, None] & m_d[None, :]
            q += tl.load(p_text[:, None] + channel[None, :], mask=m_text, other=0.0).to(tl.float32)
        q = feature_map(q)
        m_head = m_d[:, None] & (o_c // D == head)[None, :]
        for i in tl.static_range(POSITIONS):
            source = tl.minimum(first + i, tokens - 1).to(tl.int64) * C
            key_sum = tl.load(key_sum_ptr + source + channel, mask=m_d, other=0.0) * inverse_length
            share = q * key_sum[None, :]
            if POSITIONS > 1:
                share = tl.where((token == first + i)[:, None], share, 0.0)
            share /= tl.sum(share, 1)[:, None] + eps * inverse_length
            p_key_value = key_value_ptr + source * D + channel[:, None] * D + (o_c % D)[None, :]
            values = tl.load(p_key_value, mask=m_head, other=0.0) / tl.maximum(key_sum, 1e-37)[:, None]
            y = tl.dot(share.to(dtype), values.to(dtype), y, input_precision=PRECISION)
    if not EVEN:
        y = tl.where(m_c[None, :], y, 0.0)

    normalised = normalise(y, C, BLOCK_C).to(dtype)
    if POOL_H * POOL_W == 1:
        y += x
    y += tl.load(fc2_bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    EVEN_HIDDEN: tl.constexpr = EVEN and (HIDDEN % BLOCK_H == 0)
    for start in range(0, HIDDEN, BLOCK_H):
        o_h = start + tl.arange(0, BLOCK_H)
        fc1 = load_matrix(fc1_ptr, o_h, o_c, C, HIDDEN, C, EVEN_HIDDEN)
        hidden = tl.dot(normalised, tl.trans(fc1), input_precision=PRECISION)
        hidden += tl.load(fc1_bias_ptr + o_h, mask=o_h < HIDDEN, other=0.0).to(tl.float32)[None, :]
        fc2 = load_matrix(fc2_ptr, o_c, o_h, HIDDEN, C, HIDDEN, EVEN_HIDDEN)
        y = tl.dot(tl.maximum(hidden, 0.0).to(dtype), tl.trans(fc2), y, input_precision=PRECISION)

    p_out = out_ptr + ((b * classes + o_t) * HW + p) * C
    tl.store(p_out[:, None] + o_c[None, :], y, mask=m)


@triton.jit
def _unpool_kernel(
    x_ptr,  # [B, t, HW, C]
    pooled_ptr,  # [B * t, hw, C]
    out_ptr,  # [B * t, HW, C], output: x plus the interpolated pooled
    classes,  # t
    x_stride_b,
    x_stride_t,
    x_stride_p,
    row_scale,  # pooled rows a row
    column_scale,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POOL_H: tl.constexpr,
    POOL_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROWS: tl.constexpr = HEIGHT // POOL_H
    COLUMNS: tl.constexpr = WIDTH // POOL_W
    parts: tl.constexpr = (HEIGHT * WIDTH + BLOCK_P - 1) // BLOCK_P
    map_ = (tl.program_id(0) // parts).to(tl.int64)
    p = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    m = (p < HEIGHT * WIDTH)[:, None] & (o_c < C)[None, :]

    row, column = (p // WIDTH).to(tl.float32) * row_scale, (p % WIDTH).to(tl.float32) * column_scale
    top, left = tl.minimum(row.to(tl.int32), ROWS - 1), tl.minimum(column.to(tl.int32), COLUMNS - 1)
    bottom, right = tl.minimum(top + 1, ROWS - 1), tl.minimum(left + 1, COLUMNS - 1)
    down, across = (row - top)[:, None], (column - left)[:, None]
    p_map = pooled_ptr + map_ * (ROWS * COLUMNS * C) + o_c[None, :]
    top_left = tl.load(p_map + (top * COLUMNS + left)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    top_right = tl.load(p_map + (top * COLUMNS + right)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    bottom_left = tl.load(p_map + (bottom * COLUMNS + left)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    bottom_right = tl.load(p_map + (bottom * COLUMNS + right)[:, None] * C, mask=m, other=0.0).to(tl.float32)
    upper = top_left * (1 - across) + top_right * across
    lower = bottom_left * (1 - across) + bottom_right * across

    p_x = x_ptr + map_ // classes * x_stride_b + map_ % classes * x_stride_t
    x = tl.load(p_x + p[:, None] * x_stride_p + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    p_out = out_ptr + map_ * (HEIGHT * WIDTH * C)
    tl.store(p_out + p[:, None] * C + o_c[None, :], x + upper * (1 - down) + lower * down, mask=m)


# Elements of a program that interpolates.
UNPOOL_ELEMENTS = 2048


@dataclass(frozen=True)
class ApplyConfig:
    """Launch config: positions a program and classes of each, hidden channels a step."""

    positions: int
    classes: int
    hidden: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# By compute capability: rows (positions times classes) and warps of a program, 16-bit types.
TILES = {80: (64, 4), 86: (64, 8), 89: (64, 8), 90: (128, 8), 100: (64, 4)}


def default_config(capability: int, dtype: torch.dtype, precision: str, classes: int) -> ApplyConfig:
    """A config for t classes that fits GPUs of a compute capability, at the published sizes and smaller ones."""
    if dtype == torch.float32:
        num_stages = 1 if precision == "tf32x3" else 2
        return ApplyConfig(positions=1, classes=32, hidden=16, num_warps=8, num_stages=num_stages)
    rows, num_warps = TILES[capability]
    positions = 2 if classes <= rows // 2 else 1
    return ApplyConfig(positions, rows // positions, hidden=64, num_warps=num_warps, num_stages=2)


def launch(
    x: Tensor,
    text_query: Tensor | None,
    key_value: Tensor,
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
    precision: str,
    config: ApplyConfig,
) -> Tensor:
    """Class attention and MLP `[B, t, HW, C]` of `x` under the sums of `class_collect`."""
    (B, classes, HW, C), (H, W), (pool_h, pool_w) = x.shape, resolution, pooling
    rows, columns = H // pool_h, W // pool_w
    shape = {"C": C, "HEIGHT": H, "WIDTH": W, "POOL_H": pool_h, "POOL_W": pool_w}
    block_c = max(16, triton.next_power_of_2(C))
    tokens = x.new_empty((B, classes, rows * columns, C))
    grid = (triton.cdiv(B * rows * columns, config.positions) * triton.cdiv(classes, config.classes),)
    _apply_kernel[grid](
        x,
        text_query,
        key_value,
        key_sum,
        q,
        q_bias,
        fc1,
        fc1_bias,
        fc2,
        fc2_bias,
        tokens,
        classes,
        B * rows * columns,
        1 / length,
        eps,
        *x.stride()[:3],
        *(text_query.expand(B, -1, -1).stride()[:2] if text_query is not None else (0, 0)),
        **shape,
        HEADS=heads,
        HIDDEN=fc1.shape[0],
        PRECISION=precision,
        POSITIONS=config.positions,
        CLASSES=config.classes,
        BLOCK_C=block_c,
        BLOCK_D=max(16, triton.next_power_of_2(C // heads)),
        BLOCK_H=config.hidden,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        enable_fp_fusion=True,
    )
    if pool_h * pool_w == 1:
        return tokens
    out = x.new_empty((B, classes, HW, C))
    block_p = max(1, UNPOOL_ELEMENTS // block_c)
    _unpool_kernel[(B * classes * triton.cdiv(HW, block_p),)](
        x,
        tokens,
        out,
        classes,
        *x.stride()[:3],
        (rows - 1) / max(H - 1, 1),
        (columns - 1) / max(W - 1, 1),
        **shape,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


# Computes in the type of x and accumulates in fp32; autocast changes nothing.
@torch.library.custom_op("catseg_fast::class_apply", mutates_args=())
def class_apply(
    x: Tensor,
    text_query: Tensor | None,
    key_value: Tensor,
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
    precision: str,
) -> Tensor:
    """`launch` at the default config."""
    weights = (q, q_bias, fc1, fc1_bias, fc2, fc2_bias)
    config = default_config(capability_of(x.device), x.dtype, precision, x.shape[1])
    return launch(
        x, text_query, key_value, key_sum, *weights, heads, length, eps, resolution, pooling, precision, config
    )


@class_apply.register_fake
def _(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def compile_targets(capability: int) -> list[CompileTarget]:
    """The kernels at the published sizes (C = 128, 4 heads, M = 512, 24 x 24), and with 2 x 2 pooling."""
    shape = {"C": 128, "HEIGHT": 24, "WIDTH": 24, "BLOCK_C": 128}
    strides = ("x_stride_b", "x_stride_t", "x_stride_p", "text_stride_b", "text_stride_t")
    targets = []
    for dtype, name, precision, classes, pool in (
        (torch.float16, "fp16", "ieee", 1000, 1),
        (torch.float16, "fp16", "ieee", 1000, 2),
        (torch.float16, "fp16", "ieee", 10, 1),
        (torch.bfloat16, "bf16", "ieee", 1000, 1),
        (torch.float32, "fp32", "ieee", 1000, 1),
        (torch.float32, "fp32", "tf32x3", 1000, 1),
    ):
        config = default_config(capability, dtype, precision, classes)
        pooling = {"POOL_H": pool, "POOL_W": pool}
        pointers = ("x", "text", "q", "q_bias", "fc1", "fc1_bias", "fc2", "fc2_bias", "out")
        label = f"{name} {precision}" if name == "fp32" else name
        label += " few classes" if classes == 10 else " pooled" if pool > 1 else ""
        targets.append(
            CompileTarget(
                name=label,
                kernel=_apply_kernel,
                signature={
                    **{f"{pointer}_ptr": f"*{name}" for pointer in pointers},
                    **dict.fromkeys(("key_value_ptr", "key_sum_ptr", "inverse_length", "eps"), "*fp32"),
                    **dict.fromkeys(("inverse_length", "eps"), "fp32"),
                    **dict.fromkeys(("classes", "tokens", *strides), "i32"),
                },
                constexprs={
                    **shape,
                    **pooling,
                    **{"HEADS": 4, "HIDDEN": 512, "PRECISION": precision, "POSITIONS": config.positions},
                    **{"CLASSES": config.classes, "BLOCK_D": 32, "BLOCK_H": config.hidden},
                },
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                maxnreg=config.maxnreg,
                divisible=strides,
                expects_mma=None if label == "fp32 ieee" else "wgmma" if capability == 90 and name != "fp32" else "mma",
            )
        )
        if pool > 1:
            targets.append(
                CompileTarget(
                    name=f"{name} unpool",
                    kernel=_unpool_kernel,
                    signature={
                        **dict.fromkeys(("x_ptr", "pooled_ptr", "out_ptr"), f"*{name}"),
                        **dict.fromkeys(("classes", *strides[:3]), "i32"),
                        **dict.fromkeys(("row_scale", "column_scale"), "fp32"),
                    },
                    constexprs={**shape, **pooling, "BLOCK_P": UNPOOL_ELEMENTS // 128},
                    num_warps=4,
                    num_stages=1,
                    divisible=strides[:3],
                )
            )
    return targets
