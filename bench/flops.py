"""Floating-point operations of the reference's modules and of the engine's stages, counted while they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import Case, make_call
from catseg_fast import fourier, stages
from catseg_fast.class_memory import new_memory
from catseg_fast.plan import Plan
from catseg_fast.terms import chunk_text, image_terms, vocabulary_terms


def count(run: Callable[[], Any]) -> float:
    """Operations of matrix products, convolutions and attention in `run`, in units of a million.

    FFTs, of which there is one a crop, do not count.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e6


@functools.cache
def call_flop(case: Case) -> tuple[float, float]:
    """Operations of the reference and of the restructured maths, in units of one, on tensors without memory.

    Each stage of the restructured maths runs once, as with the resident policy; all 16-bit types are one.
    What picks classes, where some are dropped, counts for both.
    """
    call = make_call(case, "meta")
    call.aggregator.backend = "reference"
    dtype = torch.bfloat16 if case.dtype.itemsize == 2 else case.dtype  # fp16's range would be looked at
    kept = make_call(Case(case.variant, case.aggregated, case.crops, dtype), "meta")
    engine = kept.aggregator.engine
    engine.backend, engine.policy, engine.chunk = "torch", "resident", case.aggregated
    engine.memory_budget = "1000TiB"
    with mock.patch("torch.autocast", return_value=nullcontext()):  # which the device has not
        reference, ours, plan = count(call), count(kept), engine.plan()
    H, W = resolution = (kept.img_feats.shape[2], kept.img_feats.shape[3])
    ours -= phase_surplus(plan, case.crops * case.aggregated, resolution)
    if case.selects:
        ours += 2 * H * W * case.crops * call.text_feats[0].numel() / 1e6
    return reference * 1e6, ours * 1e6


def phase_surplus(plan: Plan, maps: int, resolution: tuple[int, int]) -> float:
    """MFLOP that torch's phase convolutions of so many maps do beyond what is wanted: a row and a column."""
    H, W = resolution
    surplus = 0.0
    for stage in plan.decoder:
        surplus += 2 * stage.phases.numel() * ((H + 1) * (W + 1) - H * W) * maps / 1e6
        H, W = 2 * H, 2 * W
    return surplus


def flop_table(case: Case) -> list[tuple[str, float, float]]:
    """Stage, MFLOP of the reference and of the engine for each class and crop.

    The last rows are the terms that are computed once an image and once a vocabulary, spread over the case's
    classes, and the sum.
    """
    call = make_call(case)
    aggregator, engine = call.aggregator, call.aggregator.engine
    aggregator.backend, aggregator.max_classes = "reference", None
    plan, (H, W) = engine.plan(), call.img_feats.shape[2:]
    image = image_terms(aggregator, plan, call.img_feats, call.guidance)
    vocabulary = vocabulary_terms(aggregator, plan, call.text_feats, normalise_prompts=False)
    text = chunk_text(vocabulary.features, vocabulary.inverse_norm, torch.float32)
    x = torch.randn(case.crops, case.classes, H * W, plan.channels)
    maps = x.unflatten(2, (H, W)).permute(0, 4, 1, 2, 3)
    layer, folded = aggregator.layers[0], plan.layers[0]

    def embed() -> None:
        if fourier.pays_off(plan, case.crops * case.classes):
            spectra = fourier.make_spectra(plan, image.features, (H, W))
            fourier.embed_cost_volume(plan, spectra, slice(0, case.crops), text)
        else:
            stages.embed_cost_volume(plan, image.features, text, (H, W))

    def spatial() -> None:
        for block, guidance in zip(folded.blocks, image.blocks[0], strict=True):
            stages.window_block(block, guidance, x)

    def classes() -> None:
        memory = new_memory(folded.classes, case.classes)
        stages.class_collect(folded.classes, memory, x, vocabulary.keys[0], (H, W))
        stages.class_apply(folded.classes, x, vocabulary.queries[0], memory, (H, W))

    with torch.no_grad():
        guidance_map = aggregator.guidance_projection(call.guidance[0])
        text_map = aggregator.project_text(call.text_feats)
        projections = zip(aggregator.decoder_guidance_projection, call.guidance[1:], strict=True)
        decoder_maps = [project(guidance) for project, guidance in projections]
    layers = len(plan.layers)
    each = case.classes * case.crops
    reference_embed = count(
        lambda: aggregator.corr_embed(aggregator.correlation(call.img_feats, call.text_feats))
    )
    rows = [
        (
            "cost volume and 7x7 convolution",
            reference_embed,
            count(embed),
        ),
        (
            "window attention: guidance once an image",
            layers * count(lambda: layer.swin_block(maps, guidance_map)),
            layers * count(spatial),
        ),
        (
            "class attention: text guidance once, padding in closed form",
            layers * count(lambda: layer.attention(maps, text_map)),
            layers * count(classes),
        ),
        (
            "decoder: phase convolutions, guidance once an image",
            count(lambda: aggregator.conv_decoder(maps, decoder_maps)),
            count(lambda: stages.decode(plan, image.decoder, x, (H, W))),
        ),
    ]
    total = count(call)
    own_terms = count(lambda: image_terms(aggregator, plan, call.img_feats, call.guidance)) + count(
        lambda: vocabulary_terms(aggregator, plan, call.text_feats, normalise_prompts=False)
    )
    rows.append(("once an image or a vocabulary", total - sum(row[1] for row in rows), own_terms))
    rows.append(("all", total, sum(row[2] for row in rows)))
    return [(name, ours / each, theirs / each) for name, ours, theirs in rows]
