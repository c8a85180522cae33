"""The linear attention over classes in plain torch ops, in any floating type; `op.py` has the equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    pooling: Sequence[int],
    means: bool = False,
) -> tuple[Tensor, Tensor]:
    """`op.class_collect`."""
    keys, values = keys_and_values(x, weight, bias, text_key, resolution, pooling)
    old = (0.0 if key_value is None else key_value, 0.0 if key_sum is None else key_sum)
    new_key_value, new_key_sum = add_up(keys, values, *old, heads, length)
    if means:
        return mean_values(new_key_value, new_key_sum, length, x.dtype), new_key_sum
    return new_key_value, new_key_sum


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
    pooling: Sequence[int],
) -> Tensor:
    """`op.class_apply`."""
    weights = (q, q_bias, fc1, fc1_bias, fc2, fc2_bias)

    def attend(queries: Tensor) -> Tensor:
        return attend_linearly(queries, means, key_sum, heads, eps)

    return apply_attention(x, text_query, weights, resolution, pooling, attend)


def keys_and_values(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    text_key: Tensor | None,
    resolution: Sequence[int],
    pooling: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, t, hw, C]` of a chunk; arguments as in `class_collect`."""
    tokens = F.layer_norm(pooled := _pool(x, resolution, pooling), pooled.shape[-1:])
    keys, values = (F.linear(tokens, *half) for half in zip(weight.chunk(2), bias.chunk(2), strict=True))
    return keys if text_key is None else keys + text_key[:, :, None], values


def add_up(
    keys: Tensor, values: Tensor, key_value: Tensor | float, key_sum: Tensor | float, heads: int, length: int
) -> tuple[Tensor, Tensor]:
    """Add a chunk's sums to old ones, `[B, hw, heads, d, d]` and `[B, hw, heads, d]`, in fp32 at least."""
    k, v = (x.unflatten(-1, (heads, -1)) for x in (feature_map(keys), values / length))
    products = torch.einsum("btnhd,btnhv->bnhdv", k, v)
    new_key_value = products.to(torch.promote_types(products.dtype, torch.float32)) + key_value
    return new_key_value, k.sum(dim=1, dtype=new_key_value.dtype) + key_sum


def mean_values(key_value: Tensor, key_sum: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The mean of all values weighted by each channel of the keys: `[B, hw, heads, d, d]`."""
    return (key_value / (key_sum / length).clamp_min(1e-37)[..., None]).to(dtype)


def attend_linearly(queries: Tensor, means: Tensor, key_sum: Tensor, heads: int, eps: float) -> Tensor:
    """Attention of `queries [B, t, hw, C]` over the classes of the means and sums."""
    q = feature_map(queries).unflatten(-1, (heads, -1))
    weights = q * key_sum[:, None]  # in the type of the sums
    shares = (weights / (weights.sum(dim=-1, keepdim=True) + eps)).to(q.dtype)
    return torch.einsum("btnhd,bnhdv->btnhv", shares, means.to(q.dtype)).flatten(-2)


def apply_attention(
    x: Tensor,
    text_query: Tensor | None,
    weights: Sequence[Tensor],
    resolution: Sequence[int],
    pooling: Sequence[int],
    attend: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute `class_apply` with any attention of queries `[B, t, hw, C]` over all classes."""
    q, q_bias, fc1, fc1_bias, fc2, fc2_bias = weights
    tokens = _pool(x, resolution, pooling)
    queries = F.linear(F.layer_norm(tokens, tokens.shape[-1:]), q, q_bias)
    if text_query is not None:
        queries = queries + text_query[:, :, None]
    tokens = tokens + attend(queries)
    hidden = F.relu_(F.linear(F.layer_norm(tokens, tokens.shape[-1:]), fc1, fc1_bias))
    tokens = tokens + F.linear(hidden, fc2, fc2_bias)
    return x + _unpool(tokens, resolution, pooling)


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1."""
    return F.elu(x) + 1


def _pool(x: Tensor, resolution: Sequence[int], pooling: Sequence[int]) -> Tensor:
    if tuple(pooling) == (1, 1):
        return x
    pooled = F.avg_pool2d(_as_maps(x, resolution), tuple(pooling))
    return pooled.permute(0, 2, 3, 1).reshape(*x.shape[:2], -1, x.shape[-1])


def _unpool(tokens: Tensor, resolution: Sequence[int], pooling: Sequence[int]) -> Tensor:
    if tuple(pooling) == (1, 1):
        return tokens
    pooled = [size // pool for size, pool in zip(resolution, pooling, strict=True)]
    maps = F.interpolate(
        _as_maps(tokens, pooled), size=tuple(resolution), mode="bilinear", align_corners=True
    )
    return maps.permute(0, 2, 3, 1).reshape(*tokens.shape[:2], -1, tokens.shape[-1])


def _as_maps(x: Tensor, resolution: Sequence[int]) -> Tensor:
    """`[B, t, HW, C]` as channels-last maps `[B*t, C, H, W]`."""
    return x.reshape(-1, *resolution, x.shape[-1]).permute(0, 3, 1, 2)
