"""The optimiser: AdamW on upstream's groups of parameters; upstream `train_net.py`, `build_optimizer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from catseg_fast.training.recipe import Recipe

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
UNDECAYED = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Group trained parameters by learning rate and weight decay.

    Returns:
        One dict per group, for the optimiser: "params", "multiplier" of the learning rate, "weight_decay".
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        multiplier = 1.0
        if "backbone" in module_name:
            multiplier *= recipe.backbone_multiplier
        if "clip_model" in module_name:
            multiplier *= recipe.clip_multiplier
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            undecayed = isinstance(module, (*NORMALISATIONS, nn.Embedding)) or name in UNDECAYED
            decay = 0.0 if undecayed else recipe.weight_decay
            groups.setdefault((multiplier, decay), []).append(parameter)
    return [
        {"params": parameters, "multiplier": multiplier, "weight_decay": decay}
        for (multiplier, decay), parameters in groups.items()
    ]


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`; learning rates are set by `set_learning_rate`."""
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, fused=True)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate for a base rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["multiplier"]
