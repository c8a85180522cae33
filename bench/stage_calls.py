"""The engine's stages one by one, on random chunks of classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, make_call
from catseg_fast.engine import torch_stages
from catseg_fast.engine.class_memory import LinearMemory, new_memory
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.streaming import Stages
from catseg_fast.engine.terms import ImageTerms, image_terms

RESOLUTION = (24, 24)
STAGES = (
    "embed_cost_volume, P=1",
    "embed_cost_volume, P=80",
    "window_block",
    "window_block, shifted",
    "class_collect",
    "class_apply",
    "decode",
)


@dataclass(frozen=True)
class StageInputs:
    """What the stages take, in one type."""

    plan: Plan
    image: ImageTerms
    x: Tensor  # [B, t, HW, C]
    text: Tensor  # [1, t, P, F], unit vectors
    guidance: Tensor  # [2, 1, t, C], the text's share of keys and queries


def variant_of(stage: str) -> str:
    """Whose weights a stage has."""
    return "v1-vitl-swinb" if stage.endswith("P=80") else "v2-vitl"


@torch.no_grad()
def make_inputs(
    stage: str, crops: int, classes: int, dtype: torch.dtype, device: torch.device
) -> StageInputs:
    """Weights and inputs of a stage, the same every time."""
    call = make_call(Case(variant_of(stage), classes, crops, dtype), device)
    plan = call.aggregator.engine.plan()
    with torch.device(device):
        x = torch.randn(crops, classes, RESOLUTION[0] * RESOLUTION[1], plan.channels)
        guidance = torch.randn(2, 1, classes, plan.channels)
    return StageInputs(
        plan,
        image_terms(call.aggregator, plan, call.img_feats, call.guidance),
        x.to(dtype),
        F.normalize(call.text_feats[:1], dim=-1).to(dtype),
        guidance.to(dtype),
    )


@torch.no_grad()
def bind(stage: str, inputs: StageInputs) -> Callable[[Stages], Tensor]:
    """The stage on its inputs, by whichever stages are given; what it needs besides is computed by torch."""
    plan, image, x = inputs.plan, inputs.image, inputs.x
    layer = plan.layers[0]
    classes = layer.classes
    key, query = inputs.guidance

    def collect(stages: Stages) -> LinearMemory:
        memory = new_memory(classes, x.shape[1])
        stages.class_collect(classes, memory, x, key, RESOLUTION)
        assert isinstance(memory, LinearMemory)
        return memory

    def collected(stages: Stages) -> Tensor:
        key_value = collect(stages).key_value
        assert isinstance(key_value, Tensor)
        return key_value

    if stage == "class_collect":
        return collected
    if stage == "class_apply":
        memory = collect(torch_stages)
        return lambda stages: stages.class_apply(classes, x, query, memory, RESOLUTION)
    if stage == "decode":
        return lambda stages: stages.decode(plan, image.decoder, x, RESOLUTION)
    if stage.startswith("embed_cost_volume"):
        return lambda stages: stages.embed_cost_volume(plan, image.features, inputs.text, RESOLUTION)
    shifted = stage.endswith("shifted")
    return lambda stages: stages.window_block(layer.blocks[shifted], image.blocks[0][shifted], x)


def least_bytes(stage: str, inputs: StageInputs, answer: Tensor) -> int:
    """The chunk (or what its cost volume is made of) read once, the answer written once."""
    if stage.startswith("embed_cost_volume"):
        return inputs.text.nbytes + inputs.image.features.nbytes + answer.nbytes
    return inputs.x.nbytes + answer.nbytes
