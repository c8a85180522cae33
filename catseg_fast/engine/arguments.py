"""Folded weights as arguments of ops, which are tensors and numbers; all tensors are views."""

from __future__ import annotations

from torch import Tensor

from catseg_fast.engine.folding import ClassLayer, Plan, WindowBlock

WindowWeights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
ApplyWeights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Decoding = tuple[list[Tensor], list[int], list[float]]


def embedding(plan: Plan) -> tuple[Tensor, Tensor]:
    """Return weight `[C, 7, 7, P]` and bias of `embed_cost_volume`."""
    return taps_first(plan.embed), plan.embed_bias


def window_weights(block: WindowBlock) -> WindowWeights:
    """Return the weights of `window_block`, from `qkv` on."""
    return (
        block.qkv, block.proj, block.proj_bias, block.fc1, block.fc1_bias, block.fc2, block.fc2_bias
    )  # fmt: skip


def apply_weights(layer: ClassLayer) -> ApplyWeights:
    """Return the weights of `class_apply`, from `q` on."""
    return layer.q, layer.q_bias, layer.fc1, layer.fc1_bias, layer.fc2, layer.fc2_bias


def decoding(plan: Plan) -> Decoding:
    """Return weights, groups and eps of `decode`."""
    weights: list[Tensor] = []
    for stage in plan.decoder:
        weights += [taps_first(stage.phases.flatten(0, 2)), stage.norm1.weight, stage.norm1.bias]
        weights += [taps_first(stage.conv), stage.norm2.weight, stage.norm2.bias]
    norms = [norm for stage in plan.decoder for norm in (stage.norm1, stage.norm2)]
    weights += [taps_first(plan.head), plan.head_bias]
    return weights, [norm.groups for norm in norms], [norm.eps for norm in norms]


def taps_first(weight: Tensor) -> Tensor:
    """Permute `[out, in, K, K]` to `[out, K, K, in]`."""
    return weight.permute(0, 2, 3, 1)


def channels_last(maps: Tensor) -> Tensor:
    """Permute `[B, C, H, W]` to `[B, HW, C]`."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)
