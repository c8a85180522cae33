"""Upstream's trained parameters and loss; `cat_seg/cat_seg_model.py` of both generations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catseg_fast.config import IGNORE_LABEL, Version
from catseg_fast.errors import InputError
from catseg_fast.labels import class_indices

CLIP_FINETUNE = ("attention", "full", "prompt", "none")


def is_trained(name: str, clip_finetune: str, version: Version) -> bool:
    """Check whether upstream trains CLIP's parameter `name` under a fine-tuning rule.

    v1 trains only in the image tower, v2 in the blocks of both towers; "attention" means the attention and
    positional embeddings in v1, and query and value weights in v2.
    """
    tower = "visual" if version == "v1" else "transformer"
    if tower not in name:
        return False
    if clip_finetune == "prompt":
        return "prompt" in name
    if clip_finetune == "attention" and version == "v1":
        return "attn" in name or "position" in name
    if clip_finetune == "attention":
        return ("q_proj" in name or "v_proj" in name) if "attn" in name else "position" in name
    return clip_finetune == "full"


def freeze(
    clip: nn.Module, backbone: nn.Module | None, clip_finetune: str, version: Version, train_backbone: bool
) -> None:
    """Set `requires_grad` as upstream does.

    Args:
        clip: the CLIP model.
        backbone: v1's guidance backbone, or None.
        clip_finetune: "attention", "full", "prompt" or "none".
        version: upstream's generation.
        train_backbone: whether the backbone is trained (upstream: BACKBONE_MULTIPLIER > 0), except its first
            norm.

    Raises:
        InputError: if `clip_finetune` is unknown.
    """
    if clip_finetune not in CLIP_FINETUNE:
        raise InputError(f"clip_finetune: {clip_finetune!r} is not one of {', '.join(CLIP_FINETUNE)}")
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(is_trained(name, clip_finetune, version))
    if backbone is not None:
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(train_backbone and "norm0" not in name)


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_label: int = IGNORE_LABEL) -> Tensor:
    """Return the mean binary cross-entropy over pixels and classes.

    As in upstream, a pixel with the ignore label counts as belonging to no class.

    Args:
        logits: `[B, T, h, w]`, resized to the labels' size.
        labels: class indices `[B, H, W]` of any integer type.
        ignore_label: label of pixels without a class.

    Raises:
        InputTypeError: if the labels are not integers.
        InputError: if a label is neither a class index nor the ignore label.
    """
    labels = class_indices(labels, logits.shape[1], ignore_label)
    known = labels != ignore_label
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    targets = torch.zeros_like(logits)
    targets.scatter_(1, torch.where(known, labels, 0)[:, None], known[:, None].to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, targets)
