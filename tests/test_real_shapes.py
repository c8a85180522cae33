"""Every Triton kernel at the shapes of the published variants: 5 crops and up to 1203 classes on a GPU.

`pytest -m gpu` runs the large ones. Without a GPU, the same checks run on one crop and two classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast import Aggregator
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.terms import ImageTerms, image_terms
from catseg_fast.inference.readout import LabelMap, Readout
from catseg_fast.kernels import label_map as label_map_kernel
from catseg_fast.kernels.class_attention import op as class_attention
from catseg_fast.kernels.cost_volume import op as cost_volume
from catseg_fast.kernels.decoder import op as decoder
from catseg_fast.kernels.window_attention import op as window_attention
from catseg_fast.reference.inference import SlidingWindow
from support.accuracy import assert_no_worse_than_eager, upcast

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
RESOLUTION = (24, 24)
FEATURES = 768
CHUNK = 64  # classes that are computed in float64 at a time

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")]
shapes = pytest.mark.parametrize(
    ("crops", "classes"),
    [(1, 2), *(pytest.param(5, classes, marks=on_gpu) for classes in (1, 150, 256, 847, 1203))],
)
types = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float16, marks=on_gpu),
        pytest.param(torch.bfloat16, marks=on_gpu),  # which the interpreter computes wrongly
    ],
    ids=str,
)


@functools.cache
def make_aggregator(prompts: int) -> Aggregator:
    torch.manual_seed(0)
    aggregator = Aggregator(
        text_guidance_dim=FEATURES,
        text_guidance_proj_dim=128,
        appearance_guidance_dim=FEATURES,
        appearance_guidance_proj_dim=128,
        decoder_dims=(64, 32),
        decoder_guidance_dims=(256, 128),
        decoder_guidance_proj_dims=(32, 16),
        num_layers=2,
        nheads=4,
        hidden_dim=128,
        pooling_size=(1, 1) if GPU else (6, 6),
        prompt_channel=prompts,
        pad_len=256 if prompts == 1 else 0,
    )
    return aggregator.to(DEVICE).eval()


@torch.no_grad()
def make_terms(crops: int, dtype: torch.dtype, prompts: int = 1) -> tuple[Plan, ImageTerms]:
    aggregator = make_aggregator(prompts)
    torch.manual_seed(1)
    plan = aggregator.engine.plan(dtype)
    guidance = [random(crops, c, 24 * k, 24 * k) for c, k in ((FEATURES, 1), (256, 2), (128, 4))]
    return plan, image_terms(aggregator, plan, random(crops, FEATURES, *RESOLUTION), guidance)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def check_classes_apart(ours: Tensor, run: Callable[..., Tensor], x: Tensor, *arguments: Any) -> None:
    """Compare a stage that treats each class alone with torch, on the first, middle and last classes."""
    classes = ours.shape[1]
    kept = torch.tensor(
        sorted({0, 1 % classes, classes // 2, classes - 2 if classes > 1 else 0, classes - 1})
    )
    kept = kept.to(x.device)
    eager, truth = run(x[:, kept], *arguments), run(x[:, kept].double(), *upcast(arguments))
    assert_no_worse_than_eager(ours[:, kept], eager, truth)
    assert ours.isfinite().all()


@shapes
@types
@pytest.mark.parametrize("prompts", [1, pytest.param(80, marks=on_gpu)])
@torch.no_grad()
def test_embed_cost_volume(crops: int, classes: int, dtype: torch.dtype, prompts: int) -> None:
    plan, image = make_terms(crops, dtype, prompts)
    text = F.normalize(random(1, classes, prompts, FEATURES), dim=-1).to(dtype)
    ours = cost_volume.embed_cost_volume(plan, image.features, text, RESOLUTION)

    def run(text: Tensor, plan: Plan, features: Tensor) -> Tensor:
        return stages.embed_cost_volume(plan, features, text, RESOLUTION)

    check_classes_apart(ours, run, text, plan, image.features)


@shapes
@types
@pytest.mark.parametrize("shifted", [False, True])
@torch.no_grad()
def test_window_block(crops: int, classes: int, dtype: torch.dtype, shifted: bool) -> None:
    plan, image = make_terms(crops, dtype)
    x = random(crops, classes, 576, 128).to(dtype)
    block, guidance = plan.layers[0].blocks[shifted], image.blocks[0][shifted]
    ours = window_attention.window_block(block, guidance, x)
    check_classes_apart(
        ours, lambda x, block, guidance: stages.window_block(block, guidance, x), x, block, guidance
    )


@shapes
@types
@torch.no_grad()
def test_class_attention(crops: int, classes: int, dtype: torch.dtype) -> None:
    plan, _ = make_terms(crops, dtype)
    layer = plan.layers[0].classes
    x, text = random(crops, classes, 576, 128).to(dtype), random(1, 2, classes, 128).to(dtype)

    def run(stages: Any, layer: Any, cast: Callable[[Tensor], Tensor]) -> Tensor:
        memory, parts = new_memory(layer, classes), range(0, classes, CHUNK)
        for start in parts:
            part = slice(start, start + CHUNK)
            stages.class_collect(layer, memory, cast(x[:, part]), cast(text[:, 0, part]), RESOLUTION)
        return torch.cat(
            [
                stages.class_apply(layer, cast(x[:, part]), cast(text[:, 1, part]), memory, RESOLUTION)
                for part in (slice(start, start + CHUNK) for start in parts)
            ],
            dim=1,
        )

    ours, eager = (run(implementation, layer, lambda x: x) for implementation in (class_attention, stages))
    truth = run(stages, upcast(layer), Tensor.double)
    assert_no_worse_than_eager(ours, eager, truth)


@shapes
@types
@torch.no_grad()
def test_decode(crops: int, classes: int, dtype: torch.dtype) -> None:
    plan, image = make_terms(crops, dtype)
    x = random(crops, classes, 576, 128).to(dtype)
    ours = decoder.decode(plan, image.decoder, x, RESOLUTION)

    def run(x: Tensor, plan: Plan, guidance: tuple[Tensor, Tensor]) -> Tensor:
        return stages.decode(plan, guidance, x, RESOLUTION)

    check_classes_apart(ours, run, x, plan, image.decoder)


@pytest.mark.parametrize("classes", [2, *(pytest.param(n, marks=on_gpu) for n in (150, 1203))])
@torch.no_grad()
def test_label_map(classes: int) -> None:
    readout = Readout((375, 500), SlidingWindow())
    logits = random(5, classes, 96, 96).half()
    ours, expected = (LabelMap(readout.size, DEVICE) for _ in range(2))
    for start in range(0, classes, CHUNK):
        part = logits[:, start : start + CHUNK]
        label_map_kernel.update(readout, ours, start, part)
        expected.update(start, readout(part))
    torch.testing.assert_close(ours.scores, expected.scores, rtol=0, atol=1e-5)
    assert (ours.labels == expected.labels).float().mean() >= 0.9999
