"""Layer normalisation of rows of tokens, for the kernels of both attentions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(x, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm without affine parameters of rows `[rows, BLOCK_C]` that are zero from C on."""
    centred = x - tl.sum(x, 1)[:, None] * (1.0 / C)
    if C < BLOCK_C:
        centred = tl.where((tl.arange(0, BLOCK_C) < C)[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, 1) * (1.0 / C)
    return centred * tl.rsqrt(variance + 1e-5)[:, None]
