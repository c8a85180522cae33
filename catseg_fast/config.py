"""The published CAT-Seg variants as data, and the small one whose weights come with the package.

Sources: upstream `configs/*.yaml` (v1 at af4fa0b, v2 at 6d3a188), `cat_seg/config.py`, and open_clip's
model configurations for the CLIP towers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from catseg_fast.errors import InputError

Version = Literal["v1", "v2"]

# Means and deviations of 0..255 RGB values: of ImageNet for the v1 guidance backbones, of CLIP for CLIP.
PIXEL_MEAN = (123.675, 116.280, 103.530)
PIXEL_STD = (58.395, 57.120, 57.375)
CLIP_PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)
CLIP_PIXEL_STD = (68.5005327, 66.6321579, 70.3231630)

CROP_SIZE = 384
OVERLAP = 0.333
SLIDING_RESOLUTION = (640, 640)
IGNORE_LABEL = 255
MAX_PIXELS = 200_000_000  # of a picture's file, unless the caller allows more


@dataclass(frozen=True)
class CLIPConfig:
    """A CLIP model: both towers, and the resolution at which CAT-Seg feeds the image tower.

    `image_size` is the side in pixels that the stored positional embedding belongs to; the embedding is
    resized when `input_size` differs.
    """

    embed_dim: int
    image_size: int
    input_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_heads: int
    text_layers: int
    vision_mlp_ratio: float = 4.0
    context_length: int = 77
    vocab_size: int = 49408
    quick_gelu: bool = True


@dataclass(frozen=True)
class SwinConfig:
    """The first three stages of a Swin Transformer; the defaults are Swin-B's."""

    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18)
    num_heads: tuple[int, ...] = (4, 8, 16)
    window_size: int = 12
    patch_size: int = 4


@dataclass(frozen=True)
class ResNetConfig:
    """A bottleneck ResNet of 50 or 101 layers without its last stage."""

    depth: int = 101


# The guidance backbones that the published v1 models use.
BACKBONES: dict[str, SwinConfig | ResNetConfig] = {"swin-b": SwinConfig(), "resnet-101": ResNetConfig()}


@dataclass(frozen=True)
class Variant:
    """Everything that distinguishes one published CAT-Seg model from another.

    `backbone` is v1's guidance backbone, by name (`BACKBONES`) or configuration; v2 takes its guidance from
    CLIP's own blocks `guidance_layers`. `pooling_size` is inference's (upstream trains with 2x2).
    """

    name: str
    version: Version
    clip: CLIPConfig
    backbone: str | SwinConfig | ResNetConfig | None
    appearance_guidance_dim: int
    prompt_ensemble: str
    decoder_guidance_dims: tuple[int, ...] = (256, 128)
    guidance_layers: tuple[int, int] = (7, 15)
    pad_len: int = 256
    hidden_dim: int = 128
    num_layers: int = 2
    nheads: int = 4
    window_size: int = 12
    feature_resolution: tuple[int, int] = (24, 24)
    pooling_size: tuple[int, int] | None = (1, 1)
    attention_type: str = "linear"
    text_guidance_proj_dim: int = 128
    appearance_guidance_proj_dim: int = 128
    decoder_dims: tuple[int, int] = (64, 32)
    decoder_guidance_proj_dims: tuple[int, int] = (32, 16)

    def aggregator_arguments(self, prompt_channel: int) -> dict[str, Any]:
        """Keyword arguments of `Aggregator` for this variant with `prompt_channel` prompts a class."""
        return {
            "text_guidance_dim": self.clip.embed_dim,
            "text_guidance_proj_dim": self.text_guidance_proj_dim,
            "appearance_guidance_dim": self.appearance_guidance_dim,
            "appearance_guidance_proj_dim": self.appearance_guidance_proj_dim,
            "decoder_dims": self.decoder_dims,
            "decoder_guidance_dims": self.decoder_guidance_dims,
            "decoder_guidance_proj_dims": self.decoder_guidance_proj_dims,
            "num_layers": self.num_layers,
            "nheads": self.nheads,
            "hidden_dim": self.hidden_dim,
            "pooling_size": self.pooling_size,
            "feature_resolution": self.feature_resolution,
            "window_size": self.window_size,
            "attention_type": self.attention_type,
            "prompt_channel": prompt_channel,
            "pad_len": self.pad_len,
        }


VIT_B_16 = CLIPConfig(
    embed_dim=512, image_size=224, input_size=384, patch_size=16,
    vision_width=768, vision_layers=12, vision_heads=12,
    text_width=512, text_heads=8, text_layers=12,
)  # fmt: skip
VIT_L_14 = CLIPConfig(
    embed_dim=768, image_size=336, input_size=336, patch_size=14,
    vision_width=1024, vision_layers=24, vision_heads=16,
    text_width=768, text_heads=12, text_layers=12,
)  # fmt: skip
VIT_H_14 = CLIPConfig(
    embed_dim=1024, image_size=336, input_size=336, patch_size=14,
    vision_width=1280, vision_layers=32, vision_heads=16,
    text_width=1024, text_heads=16, text_layers=24, quick_gelu=False,
)  # fmt: skip
VIT_BIGG_14 = CLIPConfig(
    embed_dim=1280, image_size=336, input_size=336, patch_size=14,
    vision_width=1664, vision_layers=48, vision_heads=16, vision_mlp_ratio=4.9231,
    text_width=1280, text_heads=20, text_layers=32, quick_gelu=False,
)  # fmt: skip

# Trained on generated scenes (`catseg_fast.data.scenes`); the aggregator behind it has the published shape.
DEMO_CLIP = CLIPConfig(
    embed_dim=128, image_size=384, input_size=384, patch_size=16,
    vision_width=160, vision_layers=6, vision_heads=5, context_length=32,
    text_width=32, text_heads=1, text_layers=2, quick_gelu=False,
)  # fmt: skip

_V1_VITL = Variant(
    name="v1-vitl-swinb", version="v1", clip=VIT_L_14, backbone="swin-b",
    appearance_guidance_dim=512, prompt_ensemble="imagenet", pad_len=0,
)  # fmt: skip
_V2_VITL = Variant(
    name="v2-vitl", version="v2", clip=VIT_L_14, backbone=None,
    appearance_guidance_dim=768, prompt_ensemble="single",
)  # fmt: skip

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _V1_VITL,
        replace(
            _V1_VITL, name="v1-vitb-r101", clip=VIT_B_16, backbone="resnet-101",
            appearance_guidance_dim=1024, decoder_guidance_dims=(512, 256),
        ),
        replace(_V1_VITL, name="v1-vith-swinb", clip=VIT_H_14),
        replace(_V1_VITL, name="v1-vitg-swinb", clip=VIT_BIGG_14),
        _V2_VITL,
        replace(_V2_VITL, name="v2-vitb", clip=VIT_B_16, appearance_guidance_dim=512, guidance_layers=(3, 7)),
        replace(
            _V2_VITL, name="demo", clip=DEMO_CLIP, appearance_guidance_dim=128, guidance_layers=(1, 3),
            decoder_guidance_dims=(64, 32),
        ),
    )
}  # fmt: skip


def get_variant(variant: str | Variant) -> Variant:
    """Look a variant up by name; a `Variant` passes through.

    Raises:
        InputError: if no published variant has this name.
    """
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise InputError(f"variant: no variant is named {variant!r}; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[variant]
