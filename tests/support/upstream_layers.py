"""The layers of `upstream_like.py`'s aggregator, with upstream's names, attributes and limits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import Mlp
from torch import Tensor, nn


class WindowAttention(nn.Module):
    def __init__(self, dim: int, guidance: int, heads: int) -> None:
        super().__init__()
        self.dim, self.num_heads, self.scale = dim, heads, (dim // heads) ** -0.5
        self.q, self.k = (nn.Linear(dim + guidance, dim) for _ in range(2))
        self.v, self.proj = (nn.Linear(dim, dim) for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            rearrange(y, "n l (h d) -> n h l d", h=self.num_heads)
            for y in (self.q(x) * self.scale, self.k(x), self.v(x[..., : self.dim]))
        )
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]).flatten(0, 1)
        attended = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(rearrange(attended, "n h l d -> n l (h d)")))


class SwinTransformerBlock(nn.Module):
    def __init__(
        self, dim: int, guidance: int, resolution: tuple[int, int], heads: int, window: int, shift: int
    ) -> None:
        super().__init__()
        self.input_resolution = resolution
        self.window_size, self.shift_size = window, shift
        if min(resolution) <= window:
            self.window_size, self.shift_size = min(resolution), 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, guidance, heads)
        self.drop_path = nn.Identity()
        self.mlp = Mlp(dim, 4 * dim)
        mask = None
        if self.shift_size:
            place = torch.zeros(1, *resolution, 1)
            for axis in (1, 2):
                for edge in (self.window_size, self.shift_size):
                    place.narrow(axis, place.shape[axis] - edge, edge).add_(4 ** (axis - 1))
            tokens = self.cut(place)[..., 0]
            mask = (tokens[:, None] != tokens[:, :, None]).float() * -100
        self.register_buffer("attn_mask", mask)

    def cut(self, x: Tensor) -> Tensor:
        w = self.window_size
        return rearrange(x, "n (h y) (w x) c -> (n h w) (y x) c", y=w, x=w)

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        (H, W), s = self.input_resolution, self.shift_size
        assert x.shape[1] == H * W, "input feature has wrong size"
        tokens = self.norm1(x)
        if guidance is not None:
            tokens = torch.cat([tokens, guidance], dim=-1)
        tokens = tokens.unflatten(1, (H, W)).roll((-s, -s), (1, 2))
        tokens = self.attn(self.cut(tokens), self.attn_mask)
        w = self.window_size
        tokens = rearrange(tokens, "(n h w) (y x) c -> n (h y) (w x) c", h=H // w, w=W // w, y=w)
        x = x + self.drop_path(tokens.roll((s, s), (1, 2)).flatten(1, 2))
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinTransformerBlockWrapper(nn.Module):
    def __init__(self, dim: int, guidance: int, resolution: tuple[int, int], heads: int, window: int) -> None:
        super().__init__()
        arguments = (dim, guidance, resolution, heads, window)
        self.block_1 = SwinTransformerBlock(*arguments, 0)
        self.block_2 = SwinTransformerBlock(*arguments, window // 2)
        self.guidance_norm = nn.LayerNorm(guidance) if guidance else None

    def spread(self, guidance: Tensor, T: int) -> Tensor:
        return repeat(guidance, "b c h w -> (b t) (h w) c", t=T)

    def forward(self, x: Tensor, appearance_guidance: Tensor | None) -> Tensor:
        B, _, T, H, _ = x.shape
        x = rearrange(x, "b c t h w -> (b t) (h w) c")
        if appearance_guidance is not None:
            appearance_guidance = self.guidance_norm(self.spread(appearance_guidance, T))
        x = self.block_2(self.block_1(x, appearance_guidance), appearance_guidance)
        return rearrange(x, "(b t) (h w) c -> b c t h w", b=B, t=T, h=H)


def elu_feature_map(x: Tensor) -> Tensor:
    return F.elu(x) + 1


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feature_map, self.eps = elu_feature_map, 1e-6

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, length = self.feature_map(queries), self.feature_map(keys), values.shape[1]
        sums = torch.einsum("nshd,nshv->nhdv", k, values / length)
        scale = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(1)) + self.eps)
        return torch.einsum("nlhd,nhdv,nlh->nlhv", q, sums, scale) * length


class FullAttention(nn.Module):
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.einsum("nlhd,nshd->nlsh", queries, keys) / queries.shape[3] ** 0.5
        return torch.einsum("nlsh,nshd->nlhd", scores.softmax(2), values)


class AttentionLayer(nn.Module):
    def __init__(self, dim: int, guidance: int, heads: int, kind: str) -> None:
        super().__init__()
        self.nheads = heads
        self.q, self.k, self.v = (nn.Linear(width, dim) for width in (dim + guidance, dim + guidance, dim))
        self.attention = LinearAttention() if kind == "linear" else FullAttention()

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        guided = x if guidance is None else torch.cat([x, guidance], dim=-1)
        parts = (self.q(guided), self.k(guided), self.v(x))
        return self.attention(*(y.unflatten(-1, (self.nheads, -1)) for y in parts)).flatten(2)


class ClassTransformerLayer(nn.Module):
    def __init__(self, dim: int, guidance: int, heads: int, kind: str, pooling: Any, pad_len: int) -> None:
        super().__init__()
        self.pool = nn.Identity() if pooling is None else nn.AvgPool2d(pooling)
        self.attention = AttentionLayer(dim, guidance, heads, kind)
        self.MLP = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pad_len = pad_len
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, dim)) if pad_len else None
        self.padding_guidance = nn.Parameter(torch.zeros(1, 1, guidance)) if pad_len and guidance else None

    def pad(self, tokens: Tensor, padding: Tensor, T: int) -> Tensor:
        return torch.cat([tokens, padding.expand(len(tokens), self.pad_len - T, -1)], dim=1)

    def enlarge(self, branch: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(branch, size=size, mode="bilinear", align_corners=True)

    def tokens(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), guidance)
        return x + self.MLP(self.norm2(x))

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        B, _, T, H, W = x.shape
        pooled = self.pool(x.transpose(1, 2).flatten(0, 1))
        h, w = pooled.shape[-2:]
        tokens = rearrange(pooled, "(b t) c h w -> (b h w) t c", b=B)
        if guidance is not None:
            guidance = repeat(guidance, "b t c -> (b h w) t c", h=h, w=w)
        if self.padding_tokens is not None and self.pad_len > T:
            tokens = self.pad(tokens, self.padding_tokens, T)
            if guidance is not None:
                guidance = self.pad(guidance, self.padding_guidance, T)
        tokens = self.tokens(tokens, guidance)[:, :T]
        branch = rearrange(tokens, "(b h w) t c -> (b t) c h w", h=h, w=w)
        branch = self.enlarge(branch, (H, W))
        return x + rearrange(branch, "(b t) c h w -> b c t h w", b=B)


class AggregatorLayer(nn.Module):
    def __init__(self, a: dict[str, Any]) -> None:
        super().__init__()
        dim, heads = a["hidden_dim"], a["nheads"]
        self.swin_block = SwinTransformerBlockWrapper(
            dim, a["appearance_guidance_proj_dim"], a["feature_resolution"], heads, a["window_size"]
        )
        self.attention = ClassTransformerLayer(
            dim, a["text_guidance_proj_dim"], heads, a["attention_type"], a["pooling_size"], a["pad_len"]
        )

    def forward(self, x: Tensor, appearance_guidance: Tensor | None, text_guidance: Tensor | None) -> Tensor:
        return self.attention(self.swin_block(x, appearance_guidance), text_guidance)


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [
                nn.Conv2d(width, outputs, 3, padding=1, bias=False),
                nn.GroupNorm(outputs // 16, outputs),
                nn.ReLU(inplace=True),
            ]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, guidance: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs - guidance, 2, stride=2)
        self.conv = DoubleConv(inputs, outputs)

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        x = self.up(x)
        if guidance is not None:
            x = torch.cat([x, guidance.repeat_interleave(len(x) // len(guidance), dim=0)], dim=1)
        return self.conv(x)


def project(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
