"""Floating-point operations of the reference's modules and of the engine's stages, counted while they run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import Call, Case, make_call
from catseg_fast.engine import fourier
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.terms import chunk_text, image_terms, vocabulary_terms
from catseg_fast.reference.aggregator import AggregatorLayer


def count(run: Callable[[], Any]) -> float:
    """Count the operations of matrix products, convolutions and attention in `run`, in millions.

    FFTs, of which there is one per crop, do not count. Attention runs as its two products: those of the CPU's
    fused kernel are not counted.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e6


@functools.cache
def call_flop(case: Case) -> tuple[float, float]:
    """Return the operations of the reference and of the restructured maths, on tensors without memory.

    Each stage of the restructured maths runs once, as with the resident policy; all 16-bit types are one.
    The selection of classes, if some are dropped, counts for both.
    """
    call = make_call(case, "meta")
    call.aggregator.backend = "reference"
    dtype = torch.bfloat16 if case.dtype.itemsize == 2 else case.dtype  # the range of fp16 would be checked
    kept = make_call(Case(case.variant, case.aggregated, case.crops, dtype), "meta")
    engine = kept.aggregator.engine
    engine.backend, engine.policy, engine.chunk = "torch", "resident", case.aggregated
    engine.memory_budget = "1000TiB"
    with mock.patch("torch.autocast", return_value=nullcontext()):  # which the meta device lacks
        reference, ours, plan = count(call), count(kept), engine.plan()
    H, W = resolution = (kept.img_feats.shape[2], kept.img_feats.shape[3])
    phases = [stage.phases for stage in plan.decoder]
    ours -= phase_surplus(phases, case.crops * case.aggregated, resolution)
    if case.selects:
        ours += 2 * H * W * case.crops * call.text_feats[0].numel() / 1e6
    return reference * 1e6, ours * 1e6


def phase_surplus(phases: Sequence[Tensor], maps: int, resolution: tuple[int, int]) -> float:
    """Return the MFLOP that torch's phase convolutions of `maps` maps do in excess: a row and a column.

    `phases` are each decoder stage's weights.
    """
    H, W = resolution
    surplus = 0.0
    for weight in phases:
        surplus += 2 * weight.numel() * ((H + 1) * (W + 1) - H * W) * maps / 1e6
        H, W = 2 * H, 2 * W
    return surplus


def reference_parts(call: Call) -> dict[str, Callable[[], Tensor]]:
    """Return the reference's modules by the stage in their place; both window blocks of a layer are one."""
    aggregator, (H, W) = call.aggregator, call.img_feats.shape[2:]
    layer = cast(AggregatorLayer, aggregator.layers[0])
    assert aggregator.guidance_projection is not None
    assert aggregator.decoder_guidance_projection is not None
    with torch.no_grad():
        guidance = aggregator.guidance_projection(call.guidance[0])
        text = aggregator.project_text(call.text_feats)
        projections = zip(aggregator.decoder_guidance_projection, call.guidance[1:], strict=True)
        decoder_guidance = [project(x) for project, x in projections]
    B, T = call.text_feats.shape[:2]
    maps = call.img_feats.new_empty(B, aggregator.hidden_dim, T, H, W)
    return {
        "embed_cost_volume": lambda: aggregator.corr_embed(
            aggregator.correlation(call.img_feats, call.text_feats)
        ),
        "window_block": lambda: layer.swin_block(maps, guidance),
        "class_attention": lambda: layer.attention(maps, text),
        "decode": lambda: aggregator.conv_decoder(maps, decoder_guidance),
    }


@functools.cache
def stage_flop(stage: str, variant: str, classes: int, crops: int) -> float | None:
    """Return the operations of the reference in place of a stage.

    None for the halves of class attention, whose padding is of all classes, not of a chunk.
    """
    parts = reference_parts(make_call(Case(variant, classes, crops), "meta"))
    if stage not in parts:
        return None
    return count(parts[stage]) * 1e6 / (2 if stage == "window_block" else 1)


def flop_table(case: Case) -> list[tuple[str, float, float]]:
    """Return stage, MFLOP of the reference and MFLOP of the engine per class and crop.

    The last rows are the terms that are computed once per image and once per vocabulary, spread over the
    case's classes, and the sum.
    """
    call = make_call(case)
    aggregator, engine = call.aggregator, call.aggregator.engine
    aggregator.backend, aggregator.max_classes = "reference", None
    plan, resolution = engine.plan(), (call.img_feats.shape[2], call.img_feats.shape[3])
    image = image_terms(aggregator, plan, call.img_feats, call.guidance)
    vocabulary = vocabulary_terms(aggregator, plan, call.text_feats, normalise_prompts=False)
    text = chunk_text(vocabulary.features, vocabulary.inverse_norm, torch.float32)
    x = torch.randn(case.crops, case.classes, resolution[0] * resolution[1], plan.channels)
    layer = plan.layers[0]

    def embed() -> None:
        if fourier.pays_off(plan, case.crops * case.classes):
            spectra = fourier.make_spectra(plan, image.features, resolution)
            fourier.embed_cost_volume(plan, spectra, slice(0, case.crops), text)
        else:
            stages.embed_cost_volume(plan, image.features, text, resolution)

    def spatial() -> None:
        for block, guidance in zip(layer.blocks, image.blocks[0], strict=True):
            stages.window_block(block, guidance, x)

    def classes() -> None:
        memory = new_memory(layer.classes, case.classes)
        stages.class_collect(layer.classes, memory, x, vocabulary.keys[0], resolution, last=True)
        stages.class_apply(layer.classes, x, vocabulary.queries[0], memory, resolution)

    def once() -> None:
        image_terms(aggregator, plan, call.img_feats, call.guidance)
        vocabulary_terms(aggregator, plan, call.text_feats, normalise_prompts=False)

    layers, reference = len(plan.layers), reference_parts(call)
    rows = [
        (name, times * count(reference[stage]), times * count(ours))
        for name, stage, times, ours in (
            ("cost volume and 7x7 convolution", "embed_cost_volume", 1, embed),
            ("window attention: guidance once per image", "window_block", layers, spatial),
            (
                "class attention: text guidance once, padding in closed form",
                "class_attention", layers, classes,
            ),
            (
                "decoder: phase convolutions, guidance once per image",
                "decode", 1, lambda: stages.decode(plan, image.decoder, x, resolution),
            ),
        )
    ]  # fmt: skip
    total, each = count(call), case.classes * case.crops
    rows.append(("once per image or a vocabulary", total - sum(row[1] for row in rows), count(once)))
    rows.append(("all", total, sum(row[2] for row in rows)))
    return [(name, theirs / each, ours / each) for name, theirs, ours in rows]
