"""Convolution of channels-last maps as an implicit matrix product, with GroupNorm fused at both ends.

For maps `x [N, H, W, CI]`, K x K taps and an output S times as large (S = 1 or 2), output pixel (S r + a, S s + b):

    out[S r + a, S s + b] = addend + sum_ij  W[a, b, :, i, j] . f(x[r + i + a - K // 2, s + j + b - K // 2])

with f the identity or relu(scale x + shift), and zero outside the map, that is, behind f. One kernel so serves the
7x7 convolution of the cost volume (K = 7), a decoder stage's phase convolutions (K = 2, S = 2: a transposed convolution
and the 3x3 behind it), its 3x3 convolution, and the head (3x3 to one channel).

The sum over taps and channels is one matrix product whose left operand, the patches, is gathered by index arithmetic.
Patches, normalised maps, and sums with the addend never reach memory. As a by-product, each tile of pixels leaves the
sum and the squared deviations of its output channels (`group_norm.py` merges them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels.compile_target import CompileTarget

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@triton.jit(do_not_specialize=["classes", "images"])
def convolution_kernel(
    x_ptr,  # [N, H*W, CI]; N images are crops of `classes` each
    weight_ptr,  # [S*S, CO, K*K, CI]
    addend_ptr,  # [B or 1, S*H, S*W, CO] if ADDEND_IS_MAP, [CO] if not, or None
    norm_ptr,  # [N, 2, CI], scale and shift, or None
    out_ptr,  # [N, S*H, S*W, CO], output
    statistics_ptr,  # [N, tiles*S*S, 2, CO] fp32, output: sum and squared deviations, or None
    classes,  # t
    images,  # N
    x_stride_crop,
    x_stride_class,
    addend_stride_crop,
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    ADDEND_IS_MAP: tl.constexpr,
    BY_IMAGE: tl.constexpr,  # no tile holds pixels of two images; else x is contiguous
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # output channels
    BLOCK_K: tl.constexpr,  # taps x input channels a step
):
    HW: tl.constexpr = H * W
    DEPTH: tl.constexpr = K * K * CI
    phase = tl.program_id(0) % (S * S)
    tile = tl.program_id(0) // (S * S)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if BY_IMAGE:
        TILES: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
        image = tile // TILES
        crop = (image // classes).to(tl.int64)
        pixel = tile % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = pixel < HW
        p_x = x_ptr + crop * x_stride_crop + (image % classes).to(tl.int64) * x_stride_class
        image = image.to(tl.int64)
    else:
        row = tile.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (row // HW)[:, None]
        pixel = (row % HW).to(tl.int32)
        inside = row < images.to(tl.int64) * HW
        p_x = x_ptr + image * (HW * CI)
    y = tl.where(inside, pixel // W, H + K)[:, None]  # a row that has no tap inside the map
    x = (pixel % W)[:, None]

    p_weight = weight_ptr + (phase * CO + channel)[:, None] * DEPTH
    m_channel = channel < CO
    accumulator = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    # A step is of one tap where the channels allow, so that its place is the same for all of the step.
    TAPS: tl.constexpr = 1 if CI % BLOCK_K == 0 else BLOCK_K
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tap = ((start + tl.arange(0, TAPS)) // CI)[None, :]
        dy = tap // K - K // 2 + phase // S
        dx = tap % K - K // 2 + phase % S
        m_map = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        m_depth = (k < DEPTH)[None, :]
        m_patch = m_map if DEPTH % BLOCK_K == 0 else m_map & m_depth
        o_patch = pixel[:, None] * CI + (dy * W + dx) * CI + (k % CI)[None, :]
        patch = tl.load(p_x + o_patch, mask=m_patch, other=0.0, cache_modifier=".ca")
        if norm_ptr is not None:
            p_norm = norm_ptr + image * (2 * CI) + (k % CI)[None, :]
            normalised = tl.fma(patch, tl.load(p_norm), tl.load(p_norm + CI))
            # ReLU, and zero outside the map. NaN must come through, for an overflow to be seen in the end.
            highest = tl.where(m_map, float("inf"), 0.0).to(normalised.dtype)
            lowest = tl.zeros((1, 1), normalised.dtype)
            positive = tl.maximum(normalised, lowest, propagate_nan=tl.PropagateNan.ALL)
            patch = tl.minimum(positive, highest, propagate_nan=tl.PropagateNan.ALL).to(x_ptr.dtype.element_ty)
        m_weight = m_channel[:, None] if DEPTH % BLOCK_K == 0 else m_channel[:, None] & m_depth
        weight = tl.load(p_weight + k[None, :], mask=m_weight, other=0.0)
        accumulator = tl.dot(patch, tl.trans(weight), accumulator, input_precision=PRECISION)

    m_out = inside[:, None] & m_channel[None, :]
    o_out = ((S * y + phase // S) * (S * W) + S * x + phase % S) * CO + channel[None, :]
    if addend_ptr is not None:
        if ADDEND_IS_MAP:
            addend = tl.load(addend_ptr + crop * addend_stride_crop + o_out, mask=m_out, other=0.0)
        else:
            addend = tl.load(addend_ptr + channel, mask=m_channel, other=0.0)[None, :]
        accumulator += addend.to(tl.float32)
    tl.store(out_ptr + image * (S * S * HW * CO) + o_out, accumulator, mask=m_out)
    if statistics_ptr is not None:
        count = tl.minimum(HW - tile % TILES * BLOCK_P, BLOCK_P)
        total = tl.sum(tl.where(inside[:, None], accumulator, 0.0), 0)
        deviation = tl.where(inside[:, None], accumulator - (total / count)[None, :], 0.0)
        p_statistics = statistics_ptr + tl.program_id(0).to(tl.int64) * (2 * CO) + channel
        tl.store(p_statistics, total, mask=m_channel)
        tl.store(p_statistics + CO, tl.sum(deviation * deviation, 0), mask=m_channel)
