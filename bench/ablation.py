"""The steps from the reference to the engine, one restructuring at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from bench.cases import Call
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.terms import image_terms, vocabulary_terms
from catseg_fast.reference.aggregator import AggregatorLayer

# What each step adds to the steps before it.
RESTRUCTURINGS = ("hoisted guidance", "closed-form padding", "composed decoder")
KERNELS = ("embed_cost_volume", "window_block", "class_attention", "decode")
STEPS = (
    "reference",
    *(f"+ {name}" for name in RESTRUCTURINGS),
    "+ streaming",
    *(f"+ kernel {name}" for name in KERNELS),
)


def prepare(call: Call, step: str) -> Callable[[], Tensor]:
    """Return the function that computes a call's logits `[B, T, 4H, 4W]` with all steps up to `step`.

    The steps with kernels are the Triton back end with the later stages in torch.
    """
    place = STEPS.index(step)
    engine = call.aggregator.engine
    if place <= len(RESTRUCTURINGS):
        call.aggregator.backend = "reference"
        return (lambda: _partly_folded(call, RESTRUCTURINGS[:place])) if place else call
    call.aggregator.backend = "torch"
    kernels = STEPS[: place + 1][len(RESTRUCTURINGS) + 2 :]
    if kernels:
        call.aggregator.backend = "triton"
        call()  # checks the kernels on this GPU
        fallbacks = engine.stages(engine.plan()).fallbacks  # type: ignore[attr-defined]
        if fallbacks:
            raise RuntimeError(f"kernels that do not run: {fallbacks}")
        fallbacks.update(dict.fromkeys(KERNELS[len(kernels) :], "a later step"))
    return call


@torch.no_grad()
def _partly_folded(call: Call, steps: tuple[str, ...]) -> Tensor:
    """Return the reference with some parts computed by the engine's stages, on all classes at once."""
    aggregator, plan = call.aggregator, call.aggregator.engine.plan()
    resolution = (H, W) = (call.img_feats.shape[2], call.img_feats.shape[3])
    image = image_terms(aggregator, plan, call.img_feats, call.guidance)
    vocabulary = vocabulary_terms(aggregator, plan, call.text_feats[:1], normalise_prompts=False)
    text_guidance = aggregator.project_text(call.text_feats)

    maps = aggregator.corr_embed(aggregator.correlation(call.img_feats, call.text_feats))
    for index, (layer, folded) in enumerate(zip(aggregator.layers, plan.layers, strict=True)):
        x = rearrange(maps, "B C T H W -> B T (H W) C").contiguous()
        for block, guidance in zip(folded.blocks, image.blocks[index], strict=True):
            x = stages.window_block(block, guidance, x)
        if "closed-form padding" in steps:
            memory = new_memory(folded.classes, x.shape[1])
            stages.class_collect(folded.classes, memory, x, vocabulary.keys[index], resolution, last=True)
            x = stages.class_apply(folded.classes, x, vocabulary.queries[index], memory, resolution)
        maps = rearrange(x, "B T (H W) C -> B C T H W", H=H, W=W)
        if "closed-form padding" not in steps:
            maps = cast(AggregatorLayer, layer).attention(maps, text_guidance)
    if "composed decoder" in steps:
        x = rearrange(maps, "B C T H W -> B T (H W) C").contiguous()
        return stages.decode(plan, image.decoder, x, resolution)
    assert aggregator.decoder_guidance_projection is not None
    projections = zip(aggregator.decoder_guidance_projection, call.guidance[1:], strict=True)
    return aggregator.conv_decoder(maps, [project(guidance) for project, guidance in projections])
