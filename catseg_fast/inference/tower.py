"""CLIP's image tower in 16 bits, beside weights in fp32."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from catseg_fast.weights import WeightsState, module_tensors

if TYPE_CHECKING:
    from catseg_fast.reference.clip import DenseCLIP


@dataclass(frozen=True)
class _Tower:
    """CLIP in another type, and of which weights; `instead` of the type that these overflow, if so."""

    state: object
    clip: DenseCLIP
    instead: torch.dtype | None = None


_towers: weakref.WeakKeyDictionary[nn.Module, _Tower] = weakref.WeakKeyDictionary()


def reduced_clip(clip: DenseCLIP, dtype: torch.dtype) -> DenseCLIP:
    """Return CLIP with its image tower in `dtype`, or in what replaced it; the text tower is the given one's.

    One is kept per model until a weight changes or another type is asked for.
    """
    weights = module_tensors(clip.visual, buffers=True)
    state, kept = WeightsState(weights), _towers.get(clip)
    if kept is not None and kept.state == state and dtype in (kept.clip.visual.proj.dtype, kept.instead):
        return kept.clip
    return _keep(clip, dtype, None)


def replace_type(clip: DenseCLIP, overflowing: torch.dtype, dtype: torch.dtype) -> DenseCLIP:
    """Return CLIP with its image tower in `dtype`, which `reduced_clip` then returns for `overflowing`."""
    return _keep(clip, dtype, overflowing)


def forget(clip: DenseCLIP) -> None:
    """Keep nothing of this model, which computes in its weights' type now."""
    _towers.pop(clip, None)


def _keep(clip: DenseCLIP, dtype: torch.dtype, instead: torch.dtype | None) -> DenseCLIP:
    weights = module_tensors(clip.visual, buffers=True)
    _towers.pop(clip, None)  # before the new one takes memory
    memo: dict[int, Any] = {id(x): x for x in module_tensors(clip, buffers=True)}
    with torch.inference_mode(False), torch.no_grad():
        memo |= {id(x): _cast(x, dtype) for x in weights}
        _towers[clip] = _Tower(WeightsState(weights), copy.deepcopy(clip, memo), instead)
    return _towers[clip].clip


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    cast = x.detach().to(dtype) if x.is_floating_point() else x
    return nn.Parameter(cast, requires_grad=False) if isinstance(x, nn.Parameter) else cast
