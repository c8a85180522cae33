"""The Triton cost volume and its convolution against plain torch, `stages.embed_cost_volume`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.triton_stages import kernel_embedding
from catseg_fast.kernels import load
from catseg_fast.kernels.cost_volume import op as cost_volume
from catseg_fast.kernels.cost_volume import single_prompt
from support.accuracy import assert_classes_are_apart, assert_no_worse_than_eager, upcast

DTYPES = (torch.float32, torch.float16)  # the interpreter computes bf16 incorrectly

pytestmark = pytest.mark.usefixtures("on_gpu")


def make_plan(channels: int, prompts: int, dtype: torch.dtype) -> Plan:
    """Return random weights of the embedding; the rest of the plan is empty."""
    weight = torch.randn(channels, prompts, 7, 7) / (49 * prompts) ** 0.5
    empty = torch.empty(0, dtype=dtype)
    return Plan(weight.to(dtype), torch.randn(channels).to(dtype), (), (), empty, empty)  # type: ignore[arg-type]


def make_features(
    plan: Plan, B: int, t: int, pixels: int, features: int, crops: int = 1
) -> tuple[Tensor, Tensor]:
    """Return image features, in the layout of CLIP's, and text features."""
    image = F.normalize(torch.randn(B, features, pixels), dim=1).transpose(1, 2)
    text = F.normalize(torch.randn(crops, t, plan.prompts, features), dim=-1)
    return image.to(plan.embed.dtype), text.to(plan.embed.dtype)


def embed(plan: Plan, image: Tensor, text: Tensor, resolution: tuple[int, int]) -> Tensor:
    return cost_volume.embed_cost_volume(image, text, *kernel_embedding(plan), resolution)


def check(plan: Plan, image: Tensor, text: Tensor, resolution: tuple[int, int]) -> None:
    truth = stages.embed_cost_volume(upcast(plan), upcast(image), upcast(text), resolution)
    eager = stages.embed_cost_volume(plan, image, text, resolution)
    assert_no_worse_than_eager(embed(plan, image, text, resolution), eager, truth)


@pytest.mark.usefixtures("default_configs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompts", "B", "t", "H", "W"), [(1, 2, 3, 24, 24), (80, 1, 1, 6, 10)])
def test_matches_plain_torch_with_the_default_configs(
    prompts: int, B: int, t: int, H: int, W: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plan = make_plan(128, prompts, dtype)
    check(plan, *make_features(plan, B, t, H * W, 64), (H, W))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("prompts", "B", "t", "crops", "H", "W"),
    [
        (80, 1, 1, 1, 24, 24),
        (80, 2, 2, 2, 5, 8),
        (1, 1, 33, 1, 6, 6),
        (1, 2, 7, 2, 12, 5),
        (1, 1, 2, 1, 9, 31),
        (1, 1, 1, 1, 1, 1),
        (5, 1, 2, 1, 8, 8),
    ],
)
def test_matches_plain_torch(
    prompts: int, B: int, t: int, crops: int, H: int, W: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    plan = make_plan(128, prompts, dtype)
    check(plan, *make_features(plan, B, t, H * W, 768, crops), (H, W))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_matches_plain_torch_at_random_sizes(data: st.DataObject) -> None:
    torch.manual_seed(2)
    plan = make_plan(data.draw(st.integers(1, 40), "C"), data.draw(st.integers(1, 9), "P"), torch.float32)
    H, W, t = (data.draw(st.integers(1, 9), name) for name in "HWt")
    image, text = make_features(
        plan, 2, t, H * W, data.draw(st.integers(2, 100), "F"), data.draw(st.integers(1, 2))
    )
    check(plan, image, text, (H, W))


@pytest.mark.parametrize("prompts", [1, 3])
def test_takes_any_strides(prompts: int) -> None:
    torch.manual_seed(3)
    plan = make_plan(16, prompts, torch.float32)
    image, text = make_features(plan, 2, 3, 20, 32, 2)
    expected = embed(plan, image, text, (4, 5))
    wide = torch.full((2, 25, 40), math.nan)
    wide[:, 2:22, 3:35] = image
    vocabulary = torch.full((2, 7, prompts + 1, 32), math.nan)
    vocabulary[:, 2:5, :prompts] = text
    for arguments in (
        (plan, image.contiguous(), text),
        (plan, wide[:, 2:22, 3:35], vocabulary[:, 2:5, :prompts]),
        (plan, image, text.mT.contiguous().mT),
    ):
        assert torch.equal(embed(*arguments, (4, 5)), expected)


@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize("prompts", [1, 2])
def test_takes_offsets_beyond_32_bits(prompts: int) -> None:
    torch.manual_seed(4)
    plan = make_plan(16, prompts, torch.float16)
    image, text = make_features(plan, 1, 3, 9, 16)
    far = torch.empty(2**31 + text.numel(), dtype=torch.float16)  # little of which is ever touched
    far = far.as_strided(text.shape, (0, 2**30, 16, 1)).copy_(text)
    expected = embed(plan, image, text, (3, 3))
    assert torch.equal(embed(plan, image, far, (3, 3)), expected)


@pytest.mark.parametrize("prompts", [1, 3])
def test_is_deterministic_and_classes_do_not_meet(prompts: int) -> None:
    torch.manual_seed(5)
    plan = make_plan(16, prompts, torch.float16)
    image, text = make_features(plan, 2, 5, 16, 32)
    assert_classes_are_apart(lambda text: embed(plan, image, text, (4, 4)), text)


@pytest.mark.parametrize("prompts", [1, 3])
def test_order_of_classes_does_not_matter(prompts: int) -> None:
    torch.manual_seed(5)
    plan = make_plan(16, prompts, torch.float16)
    image, text = make_features(plan, 2, 5, 16, 32)
    truth = stages.embed_cost_volume(upcast(plan), upcast(image), upcast(text), (4, 4))
    eager = stages.embed_cost_volume(plan, image, text, (4, 4))
    order = torch.tensor([3, 0, 4, 2, 1])
    ours = embed(plan, image, text[:, order], (4, 4))
    assert_no_worse_than_eager(ours, eager[:, order], truth[:, order])


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_bands_of_one_prompt_meet(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    plan = make_plan(40, 1, torch.float32)
    image, text = make_features(plan, 1, 2, 45, 32)
    default_config = single_prompt.default_config
    monkeypatch.setattr(
        single_prompt.KERNEL,
        "default_config",
        lambda *a: replace(default_config(*a), rows=rows, channels=16),
    )
    check(plan, image, text, (9, 5))


def test_is_exactly_zero_around_the_map() -> None:
    """After a map of ones, each pixel is the sum of the taps that are inside."""
    plan = make_plan(16, 1, torch.float32)
    whole = torch.randint(-8, 9, plan.embed.shape).float()  # whose sums are exact
    plan = replace(plan, embed=whole, embed_bias=torch.zeros(16))
    unit = torch.eye(16)[:1]
    image, text = unit.expand(1, 30, 16), unit.expand(1, 20, 1, 16)
    expected = F.conv2d(torch.ones(1, 1, 10, 3), whole, padding=3).flatten(2).mT
    x = embed(plan, image, text, (10, 3))
    assert torch.equal(x, expected[:, None].expand_as(x))


def test_names_what_is_wrong() -> None:
    plan = make_plan(16, 3, torch.float32)
    image, text = make_features(plan, 2, 4, 20, 32, 2)

    weight, bias = kernel_embedding(plan)

    def refused(match: str, **changes: Any) -> None:
        given = {"image": image, "text": text, "weight": weight, "bias": bias, "resolution": (4, 5)}
        with pytest.raises(ValueError, match=match):
            cost_volume.embed_cost_volume(**{**given, **changes})

    refused(r"image: has shape \[2, 20, 32\]; expected \[B, 16, F\]", resolution=(4, 4))
    refused(r"image: has shape \[2, 4, 5, 32\]", image=image.unflatten(1, (4, 5)))
    refused(r"image: dtype torch.float64", image=image.double())
    refused(r"text: has shape \[2, 4, 3, 31\]; expected \[1 or 2, 4, 3, 32\]", text=text[..., :31])
    refused(r"text: has shape \[2, 4, 2, 32\]; expected \[1 or 2, 4, 3, 32\]", text=text[:, :, :2])
    refused(r"text: has shape \[2, 0, 3, 32\]", text=text[:, :0])
    refused(r"text: has shape \[2, 12, 32\]", text=text.flatten(1, 2))
    refused(r"text: is torch.float16; expected torch.float32", text=text.half())
    refused(r"weight: is torch.float32; expected torch.float16", image=image.half(), text=text.half())
    refused(r"weight: has shape \[16, 3, 7, 7\]; expected \[16, 7, 7, 7\]", weight=plan.embed)
    refused(r"bias: has shape \[15\]; expected \[16\]", bias=bias[:15])
    refused(r"image: is on meta; the Triton kernels need a CUDA tensor", image=image.to("meta"))
    refused(r"text: is on meta; expected cpu", text=text.to("meta"))


@pytest.mark.parametrize(
    ("crops", "classes", "share"), [(5, 64, 0.9), (5, 128, 0.9), (5, 256, 0.9), (1, 64, 0.7)]
)
def test_programs_of_one_prompt_fill_the_multiprocessors(crops: int, classes: int, share: float) -> None:
    op = load("embed_cost_volume")
    sizes = replace(op.sizes["P=1"], crops=crops, classes=classes)
    _, (launch,) = op.dry_run(sizes, torch.float16, "ieee", 90)
    assert launch.grid[0] >= share * 132, "programs; H100 has 132 multiprocessors"
