"""Attention over the classes at each position, guided by text features.

CAT-Seg paper, section 3.3 (class cost aggregation); upstream `cat_seg/modeling/transformer/model.py`. Linear
attention is that of "Transformers are RNNs" (Katharopoulos et al., 2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from catseg_fast.errors import InputError


def elu_feature_map(x: Tensor) -> Tensor:
    """Apply the positive feature map of linear attention, elu(x) + 1."""
    return F.elu(x) + 1


class LinearAttention(nn.Module):
    """Attention with feature maps instead of a softmax, so that it costs O(T), not O(T^2)."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Map queries `[N, L, h, d]`, keys and values `[N, S, h, d]` to `[N, L, h, d]`."""
        q, k = elu_feature_map(queries), elu_feature_map(keys)
        length = values.shape[1]
        # Dividing by the length first keeps the sum over classes in the range of fp16.
        key_value = torch.einsum("nshd,nshv->nhdv", k, values / length)
        normaliser = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + self.eps)
        return torch.einsum("nlhd,nhdv,nlh->nlhv", q, key_value, normaliser) * length


class FullAttention(nn.Module):
    """Softmax attention with upstream's arguments; `use_dropout` drops attention weights in training."""

    def __init__(self, use_dropout: bool = False, attention_dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(attention_dropout if use_dropout else 0.0)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Map queries `[N, L, h, d]`, keys and values `[N, S, h, d]` to `[N, L, h, d]`."""
        scores = torch.einsum("nlhd,nshd->nlsh", queries, keys)
        weights = self.dropout(torch.softmax(scores / queries.shape[3] ** 0.5, dim=2))
        return torch.einsum("nlsh,nshd->nlhd", weights, values)


ATTENTION = {"linear": LinearAttention, "full": FullAttention}


class AttentionLayer(nn.Module):
    """Attention with queries and keys from features and guidance, values from features; no projection."""

    def __init__(
        self, hidden_dim: int, guidance_dim: int, nheads: int = 8, attention_type: str = "linear"
    ) -> None:
        super().__init__()
        if attention_type not in ATTENTION:
            raise InputError(f"attention_type: {attention_type!r} is not one of {', '.join(ATTENTION)}")
        self.nheads = nheads
        self.q = nn.Linear(hidden_dim + guidance_dim, hidden_dim)
        self.k = nn.Linear(hidden_dim + guidance_dim, hidden_dim)
        self.v = nn.Linear(hidden_dim, hidden_dim)
        self.attention = ATTENTION[attention_type]()

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """Map `x [N, T, C]` under `guidance [N, T, Cg]` to `[N, T, C]`."""
        guided = x if guidance is None else torch.cat([x, guidance], dim=-1)
        q, k, v = (
            rearrange(tensor, "N T (h d) -> N T h d", h=self.nheads)
            for tensor in (self.q(guided), self.k(guided), self.v(x))
        )
        return rearrange(self.attention(q, k, v), "N T h d -> N T (h d)")


class ClassTransformerLayer(nn.Module):
    """Class attention and MLP on a pooled map, resized back and added to the input.

    The pooled branch already holds its own residual, so with 1x1 pooling the input counts twice.

    Args:
        hidden_dim: channels C.
        guidance_dim: channels of the text guidance, 0 for none.
        nheads: attention heads.
        attention_type: "linear" or "full".
        pooling_size: window of the average pooling before the layer; None for none.
        pad_len: number of classes to which fewer are padded with a learned token; 0 for no padding.
    """

    def __init__(
        self,
        hidden_dim: int = 64,
        guidance_dim: int = 64,
        nheads: int = 8,
        attention_type: str = "linear",
        pooling_size: tuple[int, int] | None = (4, 4),
        pad_len: int = 256,
    ) -> None:
        super().__init__()
        self.pool = (
            nn.Identity() if pooling_size is None else nn.AvgPool2d((pooling_size[0], pooling_size[1]))
        )
        self.attention = AttentionLayer(hidden_dim, guidance_dim, nheads, attention_type)
        self.MLP = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim * 4), nn.ReLU(), nn.Linear(hidden_dim * 4, hidden_dim)
        )
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.pad_len = pad_len
        has_guidance = pad_len > 0 and guidance_dim > 0
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, hidden_dim)) if pad_len > 0 else None
        self.padding_guidance = nn.Parameter(torch.zeros(1, 1, guidance_dim)) if has_guidance else None

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """Map `x [B, C, T, H, W]` under `guidance [B, T, Cg]` (or None) to the shape of `x`."""
        B, _, T, H, W = x.shape
        pooled = self.pool(rearrange(x, "B C T H W -> (B T) C H W"))
        h, w = pooled.shape[-2:]
        tokens = rearrange(pooled, "(B T) C h w -> (B h w) T C", B=B)
        if guidance is not None:
            guidance = repeat(guidance, "B T C -> (B h w) T C", h=h, w=w)
        padding = self.pad_len - T
        if self.padding_tokens is not None and padding > 0:
            tokens = self._append(tokens, self.padding_tokens, padding)
            if guidance is not None and self.padding_guidance is not None:
                guidance = self._append(guidance, self.padding_guidance, padding)
        tokens = tokens + self.attention(self.norm1(tokens), guidance)
        tokens = (tokens + self.MLP(self.norm2(tokens)))[:, :T]
        branch = rearrange(tokens, "(B h w) T C -> (B T) C h w", h=h, w=w)
        branch = F.interpolate(branch, size=(H, W), mode="bilinear", align_corners=True)
        return x + rearrange(branch, "(B T) C H W -> B C T H W", B=B)

    @staticmethod
    def _append(tokens: Tensor, padding: Tensor, count: int) -> Tensor:
        return torch.cat([tokens, padding.expand(len(tokens), count, -1)], dim=1)
