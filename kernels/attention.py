"""Softmax attention in plain torch ops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Keys. On a CPU, torch's attention takes a row of NaN scores for one that is masked, and answers 0, where it
# has fewer keys than a vector register holds numbers; no register holds more than these.
VECTOR = 64


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, *, many: bool
) -> Tensor:
    """`F.scaled_dot_product_attention` that answers NaN where queries or all keys are NaN.

    Args:
        q: queries `[..., L, d]`.
        k: keys `[..., S, d]`.
        v: values `[..., S, d]`.
        mask: added to the scores, `[L, S]` or broadcast to it.
        scale: of the scores; by default one over the square root of d.
        many: S is known to be at least `VECTOR`.
    """
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if many:
        return attended
    return attended + ((q * 0).sum(dim=-1, keepdim=True) + (k * 0).sum(dim=(-2, -1), keepdim=True))
