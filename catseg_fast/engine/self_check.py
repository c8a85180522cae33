"""Whether stages compute on this machine what those in torch do, before they are trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.engine import torch_stages
from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.folding import ClassLayer, Plan, cast
from catseg_fast.engine.terms import ImageTerms

if TYPE_CHECKING:
    from catseg_fast.engine.streaming import Stages

CLASSES = 3

# Largest error that is accepted, in units of plain torch's in the same type. Of correct kernels it is below 2
# (`tests/support/accuracy.py`), over more values than here.
FACTOR = 4.0


def wrong_stages(candidate: Stages, plan: Plan, image: ImageTerms) -> dict[str, str]:
    """Run each stage on a few random classes of an image's first crop, against torch in fp32 or float64.

    Returns:
        By stage ("embed_cost_volume", "window_block", "class_attention", "decode"), how far it is off; empty
        if all are right. What overflows in torch, too, proves nothing and is passed over.
    """
    dtype, resolution, device = plan.embed.dtype, image.resolution, image.features.device
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    image = image.of(slice(0, 1))
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x = random(1, CLASSES, image.features.shape[1], plan.channels)
    text = F.normalize(random(1, CLASSES, plan.prompts, image.features.shape[2]), dim=-1)
    wrong: dict[str, str] = {}

    def compare(stage: str, run: Callable[..., Tensor], *arguments: object) -> None:
        truth = run(torch_stages, *cast(arguments, exact))
        eager, ours = (run(stages, *arguments).to(exact) - truth for stages in (torch_stages, candidate))
        found, allowed = ours.abs().max().item(), FACTOR * eager.abs().max().item()
        if allowed < float("inf") and not found <= allowed:
            wrong[stage] = f"error {found:.1e}, of torch {allowed / FACTOR:.1e}"

    def embed(stages: Stages, plan: Plan, features: Tensor, text: Tensor) -> Tensor:
        return stages.embed_cost_volume(plan, features, text, resolution)

    def window_block(stages: Stages, *arguments: Any) -> Tensor:
        return stages.window_block(*arguments)

    def attend(stages: Stages, layer: ClassLayer, x: Tensor) -> Tensor:
        memory = new_memory(layer, CLASSES)
        stages.class_collect(layer, memory, x, None, resolution)
        return stages.class_apply(layer, x, None, memory, resolution)

    def decode(stages: Stages, plan: Plan, guidance: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return stages.decode(plan, guidance, x, resolution)

    compare("embed_cost_volume", embed, plan, image.features, text)
    for layer, guidance in zip(plan.layers, image.blocks, strict=True):
        for block, share in zip(layer.blocks, guidance, strict=True):
            compare("window_block", window_block, block, share, x)
        compare("class_attention", attend, layer.classes, x)
    compare("decode", decode, plan, image.decoder, x)
    return wrong
