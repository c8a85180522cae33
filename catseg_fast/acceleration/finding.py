"""Finding what is built like upstream's aggregator, or like a part of it, inside a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

# What an aggregator is told by.
PARTS = (
    "layers",
    "conv1",
    "decoder1",
    "decoder2",
    "head",
    "guidance_projection",
    "text_guidance_projection",
)

# So many of these make a candidate, of which it is said what it lacks.
FEW = 3


def find_aggregators(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that have all parts of an aggregator, by name; none twice, and none inside another."""
    for name, module in model.named_modules():
        if not _lacks(module) and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def nearest_candidate(model: nn.Module) -> str | None:
    """Return a description of the module that is most like an aggregator; None if there is none."""
    candidates = [(len(_lacks(module)), name, module) for name, module in model.named_modules()]
    count, name, module = min(candidates, key=lambda candidate: candidate[0])
    if count > len(PARTS) - FEW:
        return None
    called = f"{name!r} ({type(module).__name__})" if name else f"it ({type(module).__name__})"
    return f"{called}, which lacks {', '.join(_lacks(module))}" if count else called


def _lacks(module: nn.Module) -> list[str]:
    return [part for part in PARTS if not hasattr(module, part)]
