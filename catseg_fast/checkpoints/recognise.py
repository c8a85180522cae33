"""Recognition of the variant of a state dict from its keys and shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from catseg_fast.config import (
    BACKBONES,
    VARIANTS,
    CLIPConfig,
    ResNetConfig,
    SwinConfig,
    Variant,
    Version,
)
from catseg_fast.errors import InputError
from catseg_fast.text.prompts import PROMPT_ENSEMBLES

CLIP = "sem_seg_head.predictor.clip_model."
AGGREGATOR = "sem_seg_head.predictor.transformer."
ENSEMBLES = {count: name for name, count in PROMPT_ENSEMBLES.items()}
RESNET_DEPTHS = {(3, 4, 6): 50, (3, 4, 23): 101}
PAD_LEN = 256

# A key (or its end) that identifies a family of checkpoints, in the order of the checks.
_FAMILIES = (
    (AGGREGATOR + "conv1.weight", "an incomplete CAT-Seg checkpoint"),
    ("layers.0.swin_block.block_1.attn.q.weight", "a CAT-Seg aggregator without CLIP"),
    ("vision_model.embeddings.class_embedding", "a CLIP checkpoint of Hugging Face transformers"),
    ("visual.conv1.weight", "an OpenAI or open_clip CLIP checkpoint"),
    ("layers.0.blocks.0.attn.relative_position_bias_table", "a Swin Transformer"),
    ("res2.0.conv1.weight", "a detectron2 ResNet"),
    ("layer1.0.conv1.weight", "a torchvision or timm ResNet"),
)


class _Shapes:
    """Shapes of the tensors under `prefix`; an error names a missing tensor."""

    def __init__(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        self.shapes = {
            key.removeprefix(prefix): tuple(value.shape)
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def get(self, key: str, rank: int) -> tuple[int, ...]:
        shape = self.shapes.get(key)
        if shape is None:
            raise InputError(f"an incomplete CAT-Seg checkpoint: {self.prefix}{key} is missing")
        if len(shape) != rank or 0 in shape:
            raise InputError(f"a damaged CAT-Seg checkpoint: {self.prefix}{key} has shape {shape}")
        return shape

    def count(self, stem: str) -> int:
        """Return the number of modules `stem`0., `stem`1. and so on."""
        indices = {key.removeprefix(stem).split(".")[0] for key in self.shapes if key.startswith(stem)}
        return len({index for index in indices if index.isdigit()})


def recognise_variant(state_dict: Mapping[str, Tensor]) -> Variant:
    """Return the variant with these keys and shapes: a published one, or one named "custom-…".

    The aggregator's number of heads, attention type and pooling do not follow from shapes: a custom variant
    has the published ones, and 64 channels per head in CLIP.

    Args:
        state_dict: tensors by upstream's keys; only their shapes are used, so they can be on the meta device.

    Raises:
        InputError: if this is not the state dict of a CAT-Seg; the message describes it.
    """
    if not _is_cat_seg(state_dict):
        raise InputError(f"not a CAT-Seg checkpoint: it looks like {_family(state_dict)}")
    visual = _Shapes(state_dict, CLIP + "visual.")
    split = "transformer.resblocks.0.attn.q_proj_weight" in visual
    version: Version = "v2" if split else "v1"
    variant = _aggregator(_Shapes(state_dict, AGGREGATOR), version)
    clip = _clip(visual, _Shapes(state_dict, CLIP), variant.feature_resolution[0])
    variant = replace(
        variant, name=f"custom-{version}-vit{clip.vision_width}x{clip.vision_layers}", clip=clip
    )
    if version == "v1":
        variant = replace(variant, backbone=_backbone(_Shapes(state_dict, "backbone.")))
    else:
        known = _known(clip.vision_width, clip.vision_layers, "v2")
        layers = known.guidance_layers if known else (7, 15) if clip.vision_layers > 15 else (3, 7)
        variant = replace(variant, guidance_layers=layers)
    published = (known for known in VARIANTS.values() if replace(variant, name=known.name) == known)
    return next(published, variant)


def describe(state_dict: Mapping[str, Tensor]) -> str:
    """Describe a state dict in a few words: by the variant's name if it is a CAT-Seg."""
    if not _is_cat_seg(state_dict):
        return _family(state_dict)
    try:
        return recognise_variant(state_dict).name
    except ValueError as error:
        return str(error)


def _is_cat_seg(state_dict: Mapping[str, Tensor]) -> bool:
    return AGGREGATOR + "conv1.weight" in state_dict and CLIP + "visual.conv1.weight" in state_dict


def _family(state_dict: Mapping[str, Tensor]) -> str:
    if prefix := _prefix(state_dict):
        inner = {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}
        if _is_cat_seg(inner):
            return f"{describe(inner)} with {prefix!r} before its keys; take that off"
    for ending, family in _FAMILIES:
        if any(key.endswith(ending) for key in state_dict):
            return family
    if not state_dict:
        return "an empty state dict"
    first = ", ".join(itertools.islice(state_dict, 3))
    under = f", all under {prefix!r}" if prefix and all(key.startswith(prefix) for key in state_dict) else ""
    return f"nothing known ({len(state_dict)} tensors{under}: {first}, …)"


def _prefix(state_dict: Mapping[str, Tensor]) -> str:
    """Return the prefix of a CAT-Seg's keys or, if there is none, of all keys."""
    known = AGGREGATOR + "conv1.weight"
    found = [key.removesuffix(known) for key in state_dict if key.endswith("." + known)]
    if found:
        return found[0]
    names = [key.split(".")[:-1] for key in state_dict]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return "".join(f"{column[0]}." for column in shared)


def _clip(visual: _Shapes, text: _Shapes, grid: int) -> CLIPConfig:
    """Return the CLIP of these shapes, whose images have `grid` x `grid` patches in CAT-Seg."""
    width, _, patch_size, _ = visual.get("conv1.weight", 4)
    positions = visual.get("positional_embedding", 2)[0] - 1
    side = math.isqrt(positions)
    if side * side != positions:
        raise InputError(f"a damaged CAT-Seg checkpoint: CLIP's {positions} image positions are not a square")
    hidden = visual.get("transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    layers = visual.count("transformer.resblocks.")
    vocab_size, text_width = text.get("token_embedding.weight", 2)
    known = _known(width, layers)
    return CLIPConfig(
        embed_dim=visual.get("proj", 2)[1],
        image_size=side * patch_size,
        input_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=width,
        vision_layers=layers,
        vision_heads=known.clip.vision_heads if known else max(1, width // 64),
        vision_mlp_ratio=math.ceil(1e4 * hidden / width) / 1e4,  # int(width * ratio) is `hidden` again
        text_width=text_width,
        text_heads=max(1, text_width // 64),
        text_layers=text.count("transformer.resblocks."),
        context_length=text.get("positional_embedding", 2)[0],
        vocab_size=vocab_size,
        quick_gelu=known.clip.quick_gelu if known else True,
    )


def _known(width: int, layers: int, *versions: Version) -> Variant | None:
    """Return a variant, of certain versions or any, whose CLIP has an image tower of this size."""
    for variant in VARIANTS.values():
        tower = (variant.clip.vision_width, variant.clip.vision_layers)
        if tower == (width, layers) and variant.version in (versions or ("v1", "v2")):
            return variant
    return None


def _aggregator(aggregator: _Shapes, version: Version) -> Variant:
    """Return a variant with the aggregator's fields from its shapes, and the other fields of `version`."""
    hidden_dim, prompts, _, _ = aggregator.get("conv1.weight", 4)
    if prompts not in ENSEMBLES:
        counts = ", ".join(f"{count} ({name})" for count, name in ENSEMBLES.items())
        raise InputError(f"a CAT-Seg with {prompts} prompts per class; the prompt ensembles have {counts}")
    base = VARIANTS["v1-vitl-swinb" if version == "v1" else "v2-vitl"]
    decoder_dims, guidance_dims, guidance_proj_dims = zip(
        *(_decoder_stage(aggregator, i) for i in (1, 2)), strict=True
    )
    window_size, feature_resolution = base.window_size, base.feature_resolution
    if "layers.0.swin_block.block_2.attn_mask" in aggregator:
        windows, tokens, _ = aggregator.get("layers.0.swin_block.block_2.attn_mask", 3)
        window_size = math.isqrt(tokens)
        feature_resolution = (math.isqrt(windows) * window_size,) * 2
    text_guidance_proj_dim = aggregator.get("text_guidance_projection.0.weight", 2)[0]
    appearance_guidance_proj_dim, appearance_guidance_dim, _, _ = aggregator.get(
        "guidance_projection.0.weight", 4
    )
    return replace(
        base,
        prompt_ensemble=ENSEMBLES[prompts],
        pad_len=PAD_LEN if "layers.0.attention.padding_tokens" in aggregator else 0,
        hidden_dim=hidden_dim,
        num_layers=aggregator.count("layers."),
        window_size=window_size,
        feature_resolution=feature_resolution,
        text_guidance_proj_dim=text_guidance_proj_dim,
        appearance_guidance_dim=appearance_guidance_dim,
        appearance_guidance_proj_dim=appearance_guidance_proj_dim,
        decoder_dims=decoder_dims,
        decoder_guidance_dims=guidance_dims,
        decoder_guidance_proj_dims=guidance_proj_dims,
    )


def _decoder_stage(aggregator: _Shapes, stage: int) -> tuple[int, int, int]:
    """Return the channels of decoder stage 1 or 2: of its output, guidance, and projected guidance."""
    up_in, up_out, _, _ = aggregator.get(f"decoder{stage}.up.weight", 4)
    dim = aggregator.get(f"decoder{stage}.conv.double_conv.0.weight", 4)[0]
    guidance_dim = aggregator.get(f"decoder_guidance_projection.{stage - 1}.0.weight", 4)[1]
    return dim, guidance_dim, up_in - up_out


def _backbone(backbone: _Shapes) -> str | SwinConfig | ResNetConfig:
    """Return the guidance backbone, by its name if it has one."""
    config: SwinConfig | ResNetConfig
    if "patch_embed.proj.weight" in backbone:
        embed_dim, _, patch_size, _ = backbone.get("patch_embed.proj.weight", 4)
        tables = [backbone.get(f"layers.{i}.blocks.0.attn.relative_position_bias_table", 2) for i in range(3)]
        config = SwinConfig(
            embed_dim=embed_dim,
            depths=tuple(backbone.count(f"layers.{i}.blocks.") for i in range(3)),
            num_heads=tuple(heads for _, heads in tables),
            window_size=(math.isqrt(tables[0][0]) + 1) // 2,
            patch_size=patch_size,
        )
    else:
        backbone.get("stem.conv1.weight", 4)
        depths = tuple(backbone.count(f"res{i}.") for i in (2, 3, 4))
        if depths not in RESNET_DEPTHS:
            raise InputError(
                f"a CAT-Seg whose ResNet has {depths} blocks; known are {', '.join(map(str, RESNET_DEPTHS))}"
            )
        config = ResNetConfig(RESNET_DEPTHS[depths])
    return next((name for name, known in BACKBONES.items() if known == config), config)
