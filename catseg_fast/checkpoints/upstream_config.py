"""Upstream's configuration of a model as arguments of `CATSeg`.

Sources: upstream `cat_seg/config.py`, `configs/*.yaml` and the `from_config` methods of its modules (v1 at
af4fa0b, v2 at 6d3a188). A configuration is read by its attributes, so nothing here needs detectron2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from catseg_fast.config import (
    BACKBONES,
    CLIP_PIXEL_MEAN,
    CLIP_PIXEL_STD,
    IGNORE_LABEL,
    PIXEL_MEAN,
    PIXEL_STD,
    VARIANTS,
    VIT_B_16,
    VIT_BIGG_14,
    VIT_H_14,
    VIT_L_14,
    CLIPConfig,
    ResNetConfig,
    SwinConfig,
    Variant,
)
from catseg_fast.errors import InputError
from catseg_fast.reference.finetune import CLIP_FINETUNE
from catseg_fast.text.class_lists import read_flat_classes
from catseg_fast.text.prompts import PROMPT_ENSEMBLES, check_classes

HEAD = "MODEL.SEM_SEG_HEAD."

# Guidance that v2 takes from CLIP's blocks, with the index of each; v1 takes other CLIP models, too.
GUIDANCE_LAYERS = {"ViT-B/16": (3, 7), "ViT-L/14@336px": (7, 15)}
CLIP_MODELS = {
    "ViT-B/16": VIT_B_16,
    "ViT-L/14@336px": VIT_L_14,
    "ViT-H": VIT_H_14,
    "ViT-G": VIT_BIGG_14,
}
CLIP_GUIDANCE_DIMS = (256, 128)
RESNET_DIMS = (1024, 512, 256)  # of res4, res3 and res2

# Keys for which the model supports only one value.
FIXED: dict[str, Any] = {
    "MODEL.PIXEL_MEAN": PIXEL_MEAN,
    "MODEL.PIXEL_STD": PIXEL_STD,
    "MODEL.CLIP_PIXEL_MEAN": CLIP_PIXEL_MEAN,
    "MODEL.CLIP_PIXEL_STD": CLIP_PIXEL_STD,
    HEAD + "IGNORE_VALUE": IGNORE_LABEL,
    HEAD + "PROMPT_DEPTH": 0,
    HEAD + "PROMPT_LENGTH": 0,
}
FIXED_SWIN: dict[str, Any] = {
    "MODEL.SWIN.MLP_RATIO": 4.0,
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.QK_SCALE": None,
    "MODEL.SWIN.DROP_RATE": 0.0,
    "MODEL.SWIN.ATTN_DROP_RATE": 0.0,
    "MODEL.SWIN.DROP_PATH_RATE": 0.3,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
}
FIXED_RESNET: dict[str, Any] = {
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "FrozenBN",
}


def model_arguments(cfg: Any) -> dict[str, Any]:
    """Return the keyword arguments of `CATSeg` for upstream's configuration.

    Args:
        cfg: detectron2's `CfgNode` after upstream's `add_cat_seg_config`, or an object with such attributes.

    Raises:
        FileNotFoundError: if a list of class names is missing.
        InputError: if a key is missing, or has an unsupported value; the message names it.
    """
    _check_fixed(cfg, FIXED)
    variant = _variant(cfg)
    finetune = _get(cfg, HEAD + "CLIP_FINETUNE")
    return {
        "variant": variant,
        "classes": _class_names(cfg, HEAD + "TEST_CLASS_JSON"),
        "train_classes": _class_names(cfg, HEAD + "TRAIN_CLASS_JSON"),
        "sliding_window": bool(_get(cfg, "TEST.SLIDING_WINDOW")),
        "size_divisibility": _size_divisibility(cfg, variant),
        "clip_finetune": finetune if finetune in CLIP_FINETUNE else "none",  # as upstream has it
        "train_backbone": _get(cfg, "SOLVER.BACKBONE_MULTIPLIER") > 0,
    }


def _variant(cfg: Any) -> Variant:
    """Return the variant, a published one if all values agree."""
    name = _choice(cfg, HEAD + "CLIP_PRETRAINED", CLIP_MODELS)
    clip = CLIP_MODELS[name]
    if (width := _get(cfg, HEAD + "TEXT_GUIDANCE_DIM")) != clip.embed_dim:
        raise InputError(f"{HEAD}TEXT_GUIDANCE_DIM: {width} is not the width {clip.embed_dim} of {name}")
    backbone = _backbone(cfg, clip)
    if backbone is None and name not in GUIDANCE_LAYERS:
        raise InputError(
            f"{HEAD}CLIP_PRETRAINED: {name!r} has no guidance without a backbone; only "
            f"{', '.join(GUIDANCE_LAYERS)} have"
        )
    base = VARIANTS["v2-vitl" if backbone is None else "v1-vitl-swinb"]
    variant = replace(
        base,
        name=f"configured-{base.version}",
        clip=clip,
        backbone=backbone,
        guidance_layers=GUIDANCE_LAYERS[name] if backbone is None else base.guidance_layers,
        prompt_ensemble=_choice(cfg, "MODEL.PROMPT_ENSEMBLE_TYPE", PROMPT_ENSEMBLES),
        hidden_dim=_get(cfg, HEAD + "HIDDEN_DIMS"),
        num_layers=_get(cfg, HEAD + "NUM_LAYERS"),
        nheads=_get(cfg, HEAD + "NUM_HEADS"),
        window_size=_get(cfg, HEAD + "WINDOW_SIZES"),
        feature_resolution=_feature_resolution(cfg, clip),
        pooling_size=_get(cfg, HEAD + "POOLING_SIZES"),
        attention_type=_choice(cfg, HEAD + "ATTENTION_TYPE", {"linear": 0, "full": 1}),
        text_guidance_proj_dim=_get(cfg, HEAD + "TEXT_GUIDANCE_PROJ_DIM"),
        appearance_guidance_dim=_get(cfg, HEAD + "APPEARANCE_GUIDANCE_DIM"),
        appearance_guidance_proj_dim=_get(cfg, HEAD + "APPEARANCE_GUIDANCE_PROJ_DIM"),
        decoder_dims=_get(cfg, HEAD + "DECODER_DIMS"),
        decoder_guidance_dims=_get(cfg, HEAD + "DECODER_GUIDANCE_DIMS"),
        decoder_guidance_proj_dims=_get(cfg, HEAD + "DECODER_GUIDANCE_PROJ_DIMS"),
    )
    return next((known for known in VARIANTS.values() if replace(variant, name=known.name) == known), variant)


def _backbone(cfg: Any, clip: CLIPConfig) -> str | SwinConfig | ResNetConfig | None:
    """Return v1's guidance backbone; None in v2, whose guidance has CLIP's sizes.

    A configuration of v2 names a backbone, too: detectron2's default, which upstream does not build.
    """
    key = HEAD + "APPEARANCE_GUIDANCE_DIM, DECODER_GUIDANCE_DIMS"
    dims = (_get(cfg, HEAD + "APPEARANCE_GUIDANCE_DIM"), *_get(cfg, HEAD + "DECODER_GUIDANCE_DIMS"))
    name = _get(cfg, "MODEL.BACKBONE.NAME")
    backbone: SwinConfig | ResNetConfig
    if name == "D2SwinTransformer":
        backbone = _swin(cfg)
        expected = tuple(backbone.embed_dim * factor for factor in (4, 2, 1))
    elif dims == (clip.embed_dim, *CLIP_GUIDANCE_DIMS):
        return None
    elif name == "build_resnet_backbone":
        expected = RESNET_DIMS
        if dims != expected:
            raise InputError(
                f"{key}: {dims} are neither CLIP's {(clip.embed_dim, *CLIP_GUIDANCE_DIMS)}, as in v2, nor "
                f"a ResNet's {expected}, as in v1"
            )
        backbone = _resnet(cfg)
    else:
        raise InputError(
            f"MODEL.BACKBONE.NAME: {name!r} is not one of D2SwinTransformer, build_resnet_backbone"
        )
    if dims != expected:
        raise InputError(f"{key}: {dims} are not the backbone's {expected}")
    return next((known for known, config in BACKBONES.items() if config == backbone), backbone)


def _swin(cfg: Any) -> SwinConfig:
    _check_fixed(cfg, FIXED_SWIN)
    depths = _get(cfg, "MODEL.SWIN.DEPTHS")
    if len(depths) != 3:
        raise InputError(f"MODEL.SWIN.DEPTHS: {depths} are {len(depths)} stages; expected 3")
    return SwinConfig(
        embed_dim=_get(cfg, "MODEL.SWIN.EMBED_DIM"),
        depths=depths,
        num_heads=_get(cfg, "MODEL.SWIN.NUM_HEADS"),
        window_size=_get(cfg, "MODEL.SWIN.WINDOW_SIZE"),
        patch_size=_get(cfg, "MODEL.SWIN.PATCH_SIZE"),
    )


def _resnet(cfg: Any) -> ResNetConfig:
    _check_fixed(cfg, FIXED_RESNET)
    return ResNetConfig(_choice(cfg, "MODEL.RESNETS.DEPTH", {50: 0, 101: 1}))


def _feature_resolution(cfg: Any, clip: CLIPConfig) -> tuple[int, int]:
    side = clip.input_size // clip.patch_size
    resolution = _get(cfg, HEAD + "FEATURE_RESOLUTION")
    if resolution != (side, side):
        raise InputError(f"{HEAD}FEATURE_RESOLUTION: {resolution} is not CLIP's {(side, side)}")
    return side, side


def _size_divisibility(cfg: Any, variant: Variant) -> int:
    """Return the divisor of padded whole images; if the setting is below 0, that of the backbone."""
    key = "MODEL.MASK_FORMER.SIZE_DIVISIBILITY"
    size = _get(cfg, key)
    if size < 0:
        if variant.backbone is None:
            raise InputError(f"{key}: {size} asks for the backbone's, and v2 has none")
        size = 0 if _get(cfg, "MODEL.BACKBONE.NAME") == "build_resnet_backbone" else 32
    return max(1, size)


def _class_names(cfg: Any, key: str) -> tuple[str, ...]:
    path = Path(_get(cfg, key))
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no file {path}")
    try:
        return check_classes(read_flat_classes(path, key), key)
    except ValueError as error:
        message = str(error)
        raise InputError(message if message.startswith(key) else f"{key}: {message}") from error


def _check_fixed(cfg: Any, fixed: Mapping[str, Any]) -> None:
    for key, wanted in fixed.items():
        if (found := _get(cfg, key)) != wanted:
            raise InputError(f"{key}: {found!r} is not {wanted!r}, the only supported value")


def _choice(cfg: Any, key: str, choices: Mapping[Any, Any]) -> Any:
    if (found := _get(cfg, key)) not in choices:
        raise InputError(f"{key}: {found!r} is not one of {', '.join(map(str, choices))}")
    return found


def _get(cfg: Any, key: str) -> Any:
    """Return the value of a key, with lists as tuples."""
    value = cfg
    for name in key.split("."):
        try:
            value = getattr(value, name)
        except AttributeError:
            raise InputError(
                f"{key}: the configuration has no such key; upstream's add_cat_seg_config(cfg) adds its own"
            ) from None
    return tuple(value) if isinstance(value, (list, tuple)) else value
