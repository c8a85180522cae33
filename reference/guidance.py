"""Guidance backbones of CAT-Seg v1: Swin-B and ResNet-101 up to stride 16, on timm.

    image [B, 3, H, W]  ->  res2 [B, C2, H/4, W/4],  res3 [B, C3, H/8, W/8],  res4 [B, C4, H/16, W/16]

Image sizes that do not divide are rounded up. The image is already normalised (`config.PIXEL_MEAN`,
`config.PIXEL_STD`). state_dict names and shapes are upstream's.

Sources: upstream v1 `cat_seg/modeling/backbone/swin.py` (Liu et al., Swin Transformer, 2021) and detectron2
`modeling/backbone/resnet.py` (He et al., ResNet, 2016).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d, PatchEmbed
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from catseg_fast.config import BACKBONES, ResNetConfig, SwinConfig
from catseg_fast.errors import InputError

STAGES = ("res2", "res3", "res4")


class SwinBlock(SwinTransformerBlock):
    """timm's Swin block with upstream's padding: first to whole windows, then the cyclic shift.

    timm shifts first, which gives different results if H or W is not a multiple of the window.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift_size: int, drop_path: float) -> None:
        super().__init__(
            dim,
            input_resolution=window_size,  # unused: windows never shrink, the mask follows the input
            num_heads=num_heads,
            window_size=window_size,
            shift_size=shift_size,
            always_partition=True,
            dynamic_mask=True,
            drop_path=drop_path,
        )
        # Upstream stores the index, timm does not: register it again as persistent.
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index)

    def _attn(self, x: Tensor) -> Tensor:
        """Apply (shifted) window attention to x [B, H, W, C]."""
        _, H, W, _ = x.shape
        window_h, window_w = self.window_size
        x = F.pad(x, (0, 0, 0, -W % window_w, 0, -H % window_h))
        return super()._attn(x)[:, :H, :W]


class SwinStage(nn.Module):
    """The Swin blocks of one resolution, every second one shifted, and the step down to the next."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, drop_path: Sequence[float], downsample: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                SwinBlock(dim, num_heads, window_size, shift_size=i % 2 * (window_size // 2), drop_path=rate)
                for i, rate in enumerate(drop_path)
            )
        )
        self.downsample = PatchMerging(dim) if downsample else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [B, H, W, C] to features of that shape and the next stage's input [B, H/2, W/2, 2C]."""
        x = self.blocks(x)
        return x, x if self.downsample is None else self.downsample(x)


class SwinGuidance(nn.Module):
    """The first three stages of a Swin Transformer with normalised outputs; by default Swin-B at 384 pixels.

    `drop_path_rate` is the stochastic depth of the last block in training mode; it increases linearly from 0.
    """

    def __init__(
        self,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18),
        num_heads: Sequence[int] = (4, 8, 16),
        window_size: int = 12,
        patch_size: int = 4,
        drop_path_rate: float = 0.3,
    ) -> None:
        super().__init__()
        if not len(depths) == len(num_heads) == len(STAGES):
            raise InputError(f"depths {depths} and num_heads {num_heads} need {len(STAGES)} entries each")
        widths = [embed_dim * 2**i for i in range(len(STAGES))]
        self.channels: dict[str, int] = dict(zip(STAGES, widths, strict=True))
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=patch_size,
            embed_dim=embed_dim,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            dynamic_img_pad=True,
        )
        last = sum(depths) - 1
        rates = iter([drop_path_rate * i / last for i in range(last + 1)])
        self.layers = nn.ModuleList(
            SwinStage(width, heads, window_size, [next(rates) for _ in range(depth)], width != widths[-1])
            for width, depth, heads in zip(widths, depths, num_heads, strict=True)
        )
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(width) for width in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map a normalised x [B, 3, H, W] to {"res2": [B, C, H/4, W/4], "res3": [B, 2C, ...], ...}."""
        x = self.patch_embed(x)  # [B, H/4, W/4, C]
        outputs = {}
        norms = (self.norm0, self.norm1, self.norm2)
        for name, stage, norm in zip(STAGES, self.layers, norms, strict=True):
            features, x = stage(x)
            outputs[name] = norm(features).permute(0, 3, 1, 2).contiguous()
        return outputs


def upstream_resnet_name(name: str) -> str:
    """Return detectron2's name of an entry of timm's ResNet, such as "res2.0.conv2.norm.bias"."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)", r"conv\1.norm", name)


def _rename(state_dict: dict[str, Any], prefix: str, names: dict[str, str]) -> None:
    """Rename the entries under `prefix` in place and in order; names that are not in the table stay."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        state_dict[prefix + names.get(name, name)] = state_dict.pop(key)


class ResNetGuidance(nn.Module):
    """A bottleneck ResNet without its last stage, with frozen batch norms: four buffers, never updated.

    Strides are in the 3x3 convolutions. The module tree is timm's, the state_dict detectron2's: entries are
    renamed when they are saved and loaded.
    """

    def __init__(self, depth: int = 101) -> None:
        super().__init__()
        layers = {50: (3, 4, 6), 101: (3, 4, 23)}
        if depth not in layers:
            raise InputError(f"depth {depth} is not one of {', '.join(map(str, layers))}")
        self.channels: dict[str, int] = {"res2": 256, "res3": 512, "res4": 1024}
        self.resnet = ResNet(
            Bottleneck,
            layers[depth],
            num_classes=0,
            channels=(64, 128, 256),
            norm_layer=partial(FrozenBatchNormAct2d, apply_act=False),
            zero_init_last=False,
        )
        names = self.resnet.state_dict()
        self._upstream_names = {f"resnet.{name}": upstream_resnet_name(name) for name in names}
        self._timm_names = {upstream: name for name, upstream in self._upstream_names.items()}
        self.register_state_dict_post_hook(_to_upstream_names)
        self.register_load_state_dict_pre_hook(_to_timm_names)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map a normalised x [B, 3, H, W] to {"res2": [B, 256, H/4, W/4], "res3": [B, 512, ...], ...}."""
        resnet = self.resnet
        x = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(x))))
        outputs = {}
        for name, stage in zip(STAGES, (resnet.layer1, resnet.layer2, resnet.layer3), strict=True):
            outputs[name] = x = stage(x)
        return outputs


def _to_upstream_names(module: ResNetGuidance, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state_dict, prefix, module._upstream_names)


def _to_timm_names(module: ResNetGuidance, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state_dict, prefix, module._timm_names)


def build_guidance(backbone: str | SwinConfig | ResNetConfig) -> nn.Module:
    """Build the untrained guidance backbone of a configuration, or of a name in `config.BACKBONES`.

    Raises:
        InputError: if no backbone has this name.
    """
    if isinstance(backbone, str):
        if backbone not in BACKBONES:
            raise InputError(f"unknown guidance backbone {backbone!r}; valid names: {', '.join(BACKBONES)}")
        backbone = BACKBONES[backbone]
    build = SwinGuidance if isinstance(backbone, SwinConfig) else ResNetGuidance
    return build(**asdict(backbone))
