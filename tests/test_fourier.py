"""The Fourier form of the cost volume's convolution against the direct one, in every type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.engine import fourier
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.folding import Plan
from support.accuracy import assert_no_worse_than_eager, upcast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS, FEATURES = 128, 768


def make_plan(prompts: int, dtype: torch.dtype) -> Plan:
    """Return weights of the embedding as upstream draws them; the rest of the plan is empty."""
    bound = (49 * prompts) ** -0.5
    weight = torch.empty(CHANNELS, prompts, 7, 7).uniform_(-bound, bound).to(dtype)
    empty = torch.empty(0, dtype=dtype)
    return Plan(weight, torch.empty(CHANNELS).uniform_(-bound, bound).to(dtype), (), (), empty, empty)  # type: ignore[arg-type]


def make_features(
    plan: Plan, crops: int, classes: int, pixels: int, alike: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return unit features `[B, HW, F]` and `[1, t, P, F]`; `alike` is the size of their common part."""
    common = alike * torch.randn(FEATURES)
    image = F.normalize(torch.randn(crops, pixels, FEATURES) + common, dim=-1)
    text = F.normalize(torch.randn(1, classes, plan.prompts, FEATURES) + common, dim=-1)
    return image.to(plan.embed.dtype), text.to(plan.embed.dtype)


def check(plan: Plan, image: Tensor, text: Tensor, resolution: tuple[int, int]) -> None:
    truth = stages.embed_cost_volume(upcast(plan), upcast(image), upcast(text), resolution)
    eager = stages.embed_cost_volume(plan, image, text, resolution)
    spectra = fourier.make_spectra(plan, image, resolution)
    ours = fourier.embed_cost_volume(plan, spectra, slice(0, len(image)), text)
    assert ours.is_contiguous()
    assert_no_worse_than_eager(ours, eager, truth)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("prompts", "crops", "classes", "resolution", "alike"),
    [
        (16, 2, 2, (24, 24), 0.0),
        (80, 1, 2, (24, 24), 0.0),
        (80, 1, 2, (24, 24), 1.0),
        (80, 2, 1, (12, 20), 0.0),
        (16, 1, 3, (9, 7), 0.0),
    ],
)
def test_is_as_accurate_as_the_direct_form(
    prompts: int, crops: int, classes: int, resolution: tuple[int, int], alike: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plan = make_plan(prompts, dtype)
    check(plan, *make_features(plan, crops, classes, resolution[0] * resolution[1], alike), resolution)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_takes_some_crops_and_text_of_each(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plan = make_plan(3, dtype)
    image, _ = make_features(plan, 3, 1, 42)
    text = torch.cat([make_features(plan, 1, 2, 1)[1] for _ in range(3)])
    spectra = fourier.make_spectra(plan, image, (6, 7))
    every = fourier.embed_cost_volume(plan, spectra, slice(0, 3), text)
    some = fourier.embed_cost_volume(plan, spectra, slice(1, 3), text[1:])
    shared = fourier.embed_cost_volume(plan, spectra, slice(1, 2), text[1:2])
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(some, every[1:], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(shared, every[1:2], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.03)], ids=str)
def test_is_differentiable(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(2)
    plan = make_plan(2, dtype)
    image, text = make_features(plan, 2, 2, 20)
    leaves = [x.requires_grad_() for x in (plan.embed, plan.embed_bias, image, text)]
    weights = torch.randn(2, 2, 20, CHANNELS, dtype=dtype)
    spectra = fourier.make_spectra(plan, image, (4, 5))
    ours = torch.autograd.grad(fourier.embed_cost_volume(plan, spectra, slice(0, 2), text), leaves, weights)
    direct = torch.autograd.grad(stages.embed_cost_volume(plan, image, text, (4, 5)), leaves, weights)
    for x, y in zip(ours, direct, strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


def test_pays_off_with_many_prompts_and_classes() -> None:
    assert fourier.pays_off(make_plan(80, torch.float32), 1000)
    assert not fourier.pays_off(make_plan(80, torch.float32), 1)
    assert not fourier.pays_off(make_plan(1, torch.float32), 1000)
    assert not fourier.pays_off(make_plan(80, torch.float16), 1000)
