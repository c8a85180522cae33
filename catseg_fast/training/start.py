"""Initial weights of a run: a whole checkpoint, or only CLIP, under CAT-Seg's names or open_clip's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from catseg_fast.checkpoints.checkpoint import load_into
from catseg_fast.checkpoints.recognise import CLIP, recognise_variant
from catseg_fast.config import VARIANTS, Variant
from catseg_fast.errors import InputError
from catseg_fast.model import CATSeg

JOINT, SPLIT = "attn.in_proj_weight", tuple(f"attn.{part}_proj_weight" for part in "qkv")


def load_start(model: CATSeg, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy a checkpoint into a model, all of it or only its CLIP; names and shapes must agree.

    Args:
        model: on any device.
        state_dict: upstream's, its part under `clip_model`, or that of a CLIP from OpenAI or open_clip.
        source: its name in errors.

    Raises:
        InputError: if it does not fit; the model is as before.
    """
    clip = clip_alone(state_dict)
    if clip is None:
        load_into(model, state_dict, source)
    else:
        load_into(model.clip_model, split_attention(clip) if model.variant.version == "v2" else clip, source)


def variant_of(state_dict: Mapping[str, Tensor], source: str) -> Variant:
    """Return a checkpoint's variant; for CLIP only, one that has it, v2 if possible.

    Args:
        state_dict: as for `load_start`.
        source: its name in errors.

    Raises:
        InputError: if it is neither, or no variant has this CLIP.
    """
    clip = clip_alone(state_dict)
    try:
        if clip is None:
            return recognise_variant(state_dict)
        for variant in sorted(VARIANTS.values(), key=lambda variant: variant.version, reverse=True):
            if clip_tower(clip) == (variant.clip.vision_width, variant.clip.vision_layers):
                return variant
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    width, layers = clip_tower(clip)
    raise InputError(
        f"{source}: no variant has a CLIP whose image tower has {layers} layers of {width} channels"
    )


def clip_tower(clip: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the channels and the number of layers of a CLIP's image tower."""
    blocks = {key.split(".")[3] for key in clip if key.startswith("visual.transformer.resblocks.")}
    return len(clip["visual.conv1.weight"]), len(blocks)


def clip_alone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return CLIP's parameters under its own names, if there are no others."""
    if state_dict and all(key.startswith(CLIP) for key in state_dict):
        return {key.removeprefix(CLIP): value for key, value in state_dict.items()}
    return dict(state_dict) if "visual.conv1.weight" in state_dict else None


def split_attention(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each block's joint weight of queries, keys and values as three, which is what v2 has."""
    split: dict[str, Tensor] = {}
    for key, value in clip.items():
        if key.endswith(JOINT):
            prefix = key.removesuffix(JOINT)
            split |= {prefix + part: x for part, x in zip(SPLIT, value.chunk(3), strict=True)}
        else:
            split[key] = value
    return split
