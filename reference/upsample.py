"""The guided upsampling decoder's stage; upstream `cat_seg/modeling/transformer/model.py`."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Two 3x3 convolutions without bias, each with group normalisation (groups of 16 channels) and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int | None = None) -> None:
        super().__init__()
        mid_channels = mid_channels or out_channels
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(mid_channels // 16, mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(mid_channels // 16, mid_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [N, in_channels, H, W]` to `[N, out_channels, H, W]`."""
        return self.double_conv(x)


class Up(nn.Module):
    """Double the resolution, append the guidance channels, and convolve twice."""

    def __init__(self, in_channels: int, out_channels: int, guidance_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels - guidance_channels, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Map `x [B*T, in_channels, H, W]` to `[B*T, out_channels, 2H, 2W]`; `guidance [B, Cg, 2H, 2W]`."""
        x = self.up(x)
        if guidance is not None:
            guidance = repeat(guidance, "B C H W -> (B T) C H W", T=len(x) // len(guidance))
            x = torch.cat([x, guidance], dim=1)
        return self.conv(x)
