"""Shifted-window attention over positions, guided by image features.

CAT-Seg paper, section 3.3 (spatial cost aggregation); upstream `cat_seg/modeling/transformer/model.py`. The
block is that of the Swin Transformer without relative position bias; queries and keys, but not values, also
depend on the appearance guidance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from catseg_fast.errors import InputError

MASKED = -100.0


def partition_windows(x: Tensor, window: int) -> Tensor:
    """Cut `[B, H, W, C]` into windows `[B * windows, window * window, C]`, row by row."""
    return rearrange(x, "B (h y) (w x) C -> (B h w) (y x) C", y=window, x=window)


def merge_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo `partition_windows`: `[B * windows, window * window, C]` to `[B, H, W, C]`."""
    return rearrange(
        windows, "(B h w) (y x) C -> B (h y) (w x) C",
        h=height // window, w=width // window, y=window, x=window,
    )  # fmt: skip


def fit_window(resolution: tuple[int, int], window: int, shift: int) -> tuple[int, int]:
    """Return window and shift at a resolution: one unshifted window if the map is not larger than it."""
    smallest = min(resolution)
    return (smallest, 0) if smallest <= window else (window, shift)


def shifted_window_mask(
    resolution: tuple[int, int], window: int, shift: int, device: torch.device | None = None
) -> Tensor:
    """Return the additive mask `[windows, N, N]`, N = window * window: 0 within an image region, else -100.

    After the cyclic shift, the last windows hold patches from opposite borders, which must not attend to each
    other.
    """
    height, width = resolution
    rows, columns = (
        (place >= len(place) - window).int() + (place >= len(place) - shift).int()
        for place in (torch.arange(size, device=device) for size in (height, width))
    )
    regions = (rows[:, None] * 3 + columns[None, :]).view(1, height, width, 1)
    regions = partition_windows(regions, window).squeeze(-1)  # windows, N
    different = regions[:, :, None] != regions[:, None, :]
    return different.float() * MASKED


class WindowAttention(nn.Module):
    """Multi-head attention inside windows; `x` carries its guidance in the channels after `dim`.

    Args:
        dim: channels of the values and of the output.
        appearance_guidance_dim: channels of the guidance, from which queries and keys are also computed.
        num_heads: attention heads.
        head_dim: channels per head, `dim // num_heads` by default.
        window_size: side of a window; kept for upstream's signature.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop, proj_drop: dropout rates of the attention weights and of the output.
    """

    def __init__(
        self,
        dim: int,
        appearance_guidance_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.window_size = window_size
        self.num_heads = num_heads
        head_dim = head_dim or dim // num_heads
        self.scale = head_dim**-0.5
        inner = head_dim * num_heads
        self.q = nn.Linear(dim + appearance_guidance_dim, inner, bias=qkv_bias)
        self.k = nn.Linear(dim + appearance_guidance_dim, inner, bias=qkv_bias)
        self.v = nn.Linear(dim, inner, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `x [B * windows, N, dim + guidance]` to `[B * windows, N, dim]`.

        `mask [windows, N, N]` is added to the attention scores.
        """
        heads = self.num_heads
        q = rearrange(self.q(x), "W N (h d) -> W h N d", h=heads)
        k = rearrange(self.k(x), "W N (h d) -> W h N d", h=heads)
        v = rearrange(self.v(x[..., : self.dim]), "W N (h d) -> W h N d", h=heads)
        scores = (q * self.scale) @ k.transpose(-2, -1)  # B * windows, heads, N, N
        if mask is not None:
            scores = rearrange(scores, "(B w) h N M -> B w h N M", w=len(mask)) + mask[:, None]
            scores = rearrange(scores, "B w h N M -> (B w) h N M")
        attention = self.attn_drop(scores.softmax(dim=-1))
        return self.proj_drop(self.proj(rearrange(attention @ v, "W h N d -> W N (h d)")))


class Mlp(nn.Module):
    """Two linear layers with an activation between them, as in timm."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[..., nn.Module], drop: float
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def stochastic_depth(rate: float) -> nn.Module:
    """Return the module that drops whole samples at a rate in training."""
    if rate <= 0:
        return nn.Identity()
    from timm.layers import DropPath  # no published model has it, and importing timm takes seconds

    return DropPath(rate)


class SwinTransformerBlock(nn.Module):
    """Window attention and MLP, each with pre-norm and residual.

    Args:
        dim: channels.
        appearance_guidance_dim: channels of the guidance, 0 for none.
        input_resolution: (H, W) that a call without `resolution` has.
        num_heads, head_dim, window_size, qkv_bias: see `WindowAttention`.
        shift_size: cyclic shift of the window grid in positions.
        mlp_ratio: hidden width of the MLP over `dim`.
        drop, attn_drop, drop_path: dropout rates.
        act_layer, norm_layer: layer types.
    """

    attn_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        appearance_guidance_dim: int,
        input_resolution: tuple[int, int],
        num_heads: int = 4,
        head_dim: int | None = None,
        window_size: int = 7,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if not 0 <= shift_size < window_size:
            raise InputError(f"shift_size: {shift_size} is not in [0, window_size={window_size})")
        self.dim = dim
        self.input_resolution = (input_resolution[0], input_resolution[1])
        self.nominal_window = (window_size, shift_size)
        self.window_size, self.shift_size = fit_window(self.input_resolution, window_size, shift_size)
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(
            dim, appearance_guidance_dim, num_heads, head_dim, self.window_size, qkv_bias, attn_drop, drop
        )
        self.drop_path = stochastic_depth(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        mask = None
        if self.shift_size > 0:
            mask = shifted_window_mask(self.input_resolution, self.window_size, self.shift_size)
        self.register_buffer("attn_mask", mask)

    def forward(
        self, x: Tensor, appearance_guidance: Tensor | None, resolution: tuple[int, int] | None = None
    ) -> Tensor:
        """Map `x [B, H*W, dim]` to the same shape; `appearance_guidance [B, H*W, guidance]` or None.

        Raises:
            InputError: if the length is not H*W, or the window does not divide the resolution.
        """
        resolution = resolution or self.input_resolution
        height, width = resolution
        window, shift = fit_window(resolution, *self.nominal_window)
        if x.shape[1] != height * width:
            raise InputError(f"x: length {x.shape[1]} is not H*W = {height}*{width}")
        if height % window or width % window:
            raise InputError(f"resolution: {height}x{width} is not divisible by the window {window}")
        residual = x
        x = self.norm1(x)
        if appearance_guidance is not None:
            x = torch.cat([x, appearance_guidance], dim=-1)
        x = rearrange(x, "B (H W) C -> B H W C", H=height)
        x = torch.roll(x, (-shift, -shift), dims=(1, 2)) if shift else x
        x = self.attn(partition_windows(x, window), self._mask(resolution, window, shift))
        x = merge_windows(x, window, height, width)
        x = torch.roll(x, (shift, shift), dims=(1, 2)) if shift else x
        x = residual + self.drop_path(rearrange(x, "B H W C -> B (H W) C"))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _mask(self, resolution: tuple[int, int], window: int, shift: int) -> Tensor | None:
        if not shift:
            return None
        if resolution == self.input_resolution:
            return self.attn_mask
        parameter = self.attn.q.weight
        return shifted_window_mask(resolution, window, shift).to(parameter.device, parameter.dtype)


class SwinTransformerBlockWrapper(nn.Module):
    """A block with plain windows, then one with windows shifted by half, both under the same guidance.

    `pad_len` exists for upstream's signature and state dict; spatial attention is the same for every class.
    """

    def __init__(
        self,
        dim: int,
        appearance_guidance_dim: int,
        input_resolution: tuple[int, int],
        nheads: int = 4,
        window_size: int = 5,
        pad_len: int = 0,
    ) -> None:
        super().__init__()
        self.block_1, self.block_2 = (
            SwinTransformerBlock(
                dim, appearance_guidance_dim, input_resolution, nheads,
                window_size=window_size, shift_size=shift,
            )
            for shift in (0, window_size // 2)
        )  # fmt: skip
        self.guidance_norm = nn.LayerNorm(appearance_guidance_dim) if appearance_guidance_dim > 0 else None
        self.pad_len = pad_len
        has_guidance = pad_len > 0 and appearance_guidance_dim > 0
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, dim)) if pad_len > 0 else None
        self.padding_guidance = (
            nn.Parameter(torch.zeros(1, 1, appearance_guidance_dim)) if has_guidance else None
        )

    def forward(self, x: Tensor, appearance_guidance: Tensor | None) -> Tensor:
        """Map `x [B, C, T, H, W]` to the same shape; `appearance_guidance [B, Cg, H, W]` or None."""
        B, _, T, H, W = x.shape
        x = rearrange(x, "B C T H W -> (B T) (H W) C")
        if appearance_guidance is not None and self.guidance_norm is not None:
            guidance = repeat(appearance_guidance, "B C H W -> (B T) (H W) C", T=T)
            appearance_guidance = self.guidance_norm(guidance)
        x = self.block_1(x, appearance_guidance, (H, W))
        x = self.block_2(x, appearance_guidance, (H, W))
        return rearrange(x, "(B T) (H W) C -> B C T H W", B=B, H=H)
