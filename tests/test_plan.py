"""Each restructuring of the engine against the plain computation in float64: all are identities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.engine import fourier
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.folding import build_plan, compose_phases
from support.aggregators import PUBLISHED, B, H, T, W, chunk, features, make_aggregator, terms

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def test_phase_convolutions_are_transposed_convolution_then_convolution() -> None:
    x, transposed, conv = chunk(3, 6, 5, 7), chunk(6, 4, 2, 2), chunk(8, 4, 3, 3)
    expected = F.conv2d(F.conv_transpose2d(x, transposed, stride=2), conv, padding=1)
    phases = compose_phases(transposed, conv)
    for a in range(2):
        for b in range(2):
            phase = F.conv2d(x, phases[a, b], padding=1)[:, :, a : a + 5, b : b + 7]
            torch.testing.assert_close(phase, expected[:, :, a::2, b::2], **EXACT)


@torch.no_grad()
def test_cost_volume_embedding() -> None:
    aggregator = make_aggregator()
    plan, image, vocabulary = terms(aggregator)
    img_feats, text, _ = features(aggregator)
    expected = aggregator.corr_embed(aggregator.correlation(img_feats, text))
    unit = vocabulary.features * vocabulary.inverse_norm[..., None]
    actual = stages.embed_cost_volume(plan, image.features, unit, (H, W))
    torch.testing.assert_close(actual, expected.permute(0, 2, 3, 4, 1).flatten(2, 3), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("resolution", [(24, 24), (12, 20), (7, 5)], ids=str)
def test_cost_volume_embedding_in_the_fourier_domain(resolution: tuple[int, int]) -> None:
    aggregator = make_aggregator()
    plan = build_plan(aggregator, torch.float64)
    image = F.normalize(chunk(3, resolution[0] * resolution[1], 24), dim=-1)
    text = F.normalize(chunk(3, T, 3, 24), dim=-1)
    spectra = fourier.make_spectra(plan, image, resolution)
    for crops in (slice(0, 3), slice(1, 2)):
        for shared in (text[crops], text[:1]):
            expected = stages.embed_cost_volume(plan, image[crops], shared, resolution)
            actual = fourier.embed_cost_volume(plan, spectra, crops, shared)
            torch.testing.assert_close(actual, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_window_blocks_with_guidance_once_an_image(guided: bool) -> None:
    changes = {} if guided else {"appearance_guidance_dim": 0, "appearance_guidance_proj_dim": 0}
    aggregator = make_aggregator(**changes)
    plan, image, _ = terms(aggregator)
    x = chunk(B, T, H * W, 32)
    guidance = features(aggregator)[2][0]
    projected = aggregator.guidance_projection(guidance) if guided else None
    maps = x.unflatten(2, (H, W)).permute(0, 4, 1, 2, 3)
    expected = aggregator.layers[0].swin_block(maps, projected).permute(0, 2, 3, 4, 1).flatten(2, 3)
    for block, block_guidance in zip(plan.layers[0].blocks, image.blocks[0], strict=True):
        x = stages.window_block(block, block_guidance, x)
    torch.testing.assert_close(x, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("pooling", [(1, 1), (2, 2), (5, 5), None], ids=str)
@pytest.mark.parametrize("attention", ["linear", "full"])
@pytest.mark.parametrize("pad_len", [0, T, 9])
def test_class_attention_in_chunks_with_closed_form_padding(
    pooling: tuple[int, int] | None, attention: str, pad_len: int
) -> None:
    aggregator = make_aggregator(pooling_size=pooling, attention_type=attention, pad_len=pad_len)
    plan, _, vocabulary = terms(aggregator)
    x = chunk(B, T, H * W, 32)
    maps = x.unflatten(2, (H, W)).permute(0, 4, 1, 2, 3)
    text = aggregator.project_text(features(aggregator)[1])
    expected = aggregator.layers[1].attention(maps, text).permute(0, 2, 3, 4, 1).flatten(2, 3)

    layer = plan.layers[1].classes
    memory = new_memory(layer, T)
    for classes in (slice(0, 2), slice(2, T)):
        key = vocabulary.keys[1][:, classes]
        stages.class_collect(layer, memory, x[:, classes], key, (H, W), last=classes.stop == T)
    actual = [
        stages.class_apply(layer, x[:, classes], vocabulary.queries[1][:, classes], memory, (H, W))
        for classes in (slice(0, 1), slice(1, T))
    ]
    torch.testing.assert_close(torch.cat(actual, dim=1), expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_decoder_with_guidance_once_an_image(guided: bool) -> None:
    changes = {} if guided else {"decoder_guidance_dims": (0,), "decoder_guidance_proj_dims": (0, 0)}
    aggregator = make_aggregator(**changes)
    plan, image, _ = terms(aggregator)
    x = chunk(B, T, H * W, 32)
    guidance: list[Tensor | None] = [None, None]
    if guided:
        maps = features(aggregator)[2][1:]
        guidance = [p(m) for p, m in zip(aggregator.decoder_guidance_projection, maps, strict=True)]
    expected = aggregator.conv_decoder(x.unflatten(2, (H, W)).permute(0, 4, 1, 2, 3), guidance)
    torch.testing.assert_close(stages.decode(plan, image.decoder, x, (H, W)), expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("resolution", [(24, 24), (12, 24), (12, 12), (36, 24), (8, 8)], ids=str)
def test_other_resolutions(resolution: tuple[int, int]) -> None:
    aggregator = make_aggregator(**PUBLISHED)
    h, w = resolution
    img_feats, text = chunk(1, 24, h, w), chunk(1, T, 3, 24)
    guidance = [chunk(1, c, k * h, k * w) for c, k in ((20, 1), (12, 2), (10, 4))]
    expected = aggregator(img_feats, text, guidance)
    torch.testing.assert_close(Engine(aggregator).logits(img_feats, text, guidance, 9), expected, **EXACT)


def test_a_window_that_does_not_divide_is_refused() -> None:
    aggregator = make_aggregator(**PUBLISHED)
    guidance = [chunk(1, c, k * 20, k * 24) for c, k in ((20, 1), (12, 2), (10, 4))]
    with torch.no_grad(), pytest.raises(ValueError, match="20x24 is not divisible by the window 12"):
        Engine(aggregator).logits(chunk(1, 24, 20, 24), chunk(1, T, 3, 24), guidance, None)


@torch.no_grad()
def test_changed_weights_are_folded_anew() -> None:
    aggregator = make_aggregator()
    engine, inputs = Engine(aggregator), features(aggregator)
    before = engine.logits(*inputs, 9)
    assert engine.plan() is engine.plan()
    aggregator.layers[1].attention.norm2.bias.add_(1.0)
    after = engine.logits(*inputs, 9)
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, aggregator(*inputs), **EXACT)
