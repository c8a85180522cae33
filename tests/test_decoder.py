"""The Triton decoder against its plain torch counterpart, `stages.decode`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import assert_no_worse_than_eager, upcast
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catseg_fast import stages
from catseg_fast.kernels import decoder
from catseg_fast.plan import DecoderStage, Normalisation, Plan

DTYPES = (torch.float32, torch.float16)  # the interpreter computes bf16 wrongly


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what the kernels allocate with NaN."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    yield


def make_plan(channels: int, stage_channels: tuple[int, int], dtype: torch.dtype, group: int = 16) -> Plan:
    """Random decoder weights of a trained model's scale; the rest of the plan is empty."""

    def weight(*shape: int, fan_in: int) -> Tensor:
        return (torch.randn(shape) * (2 / fan_in) ** 0.5).to(dtype)

    def norm(out: int) -> Normalisation:
        scale = torch.randn(out)  # of either sign
        return Normalisation(out // group, 1e-5, scale.to(dtype), torch.randn(out).to(dtype))

    empty, found, ins = torch.empty(0, dtype=dtype), [], channels
    for out in stage_channels:
        found.append(
            DecoderStage(
                phases=weight(2, 2, out, ins, 2, 2, fan_in=4 * ins),
                guidance=None,
                up_bias=empty,
                up_conv=empty,
                norm1=norm(out),
                conv=weight(out, out, 3, 3, fan_in=9 * out),
                norm2=norm(out),
            )
        )
        ins = out
    head = weight(1, ins, 3, 3, fan_in=9 * ins)
    return Plan(empty, empty, (), (found[0], found[1]), head, torch.randn(1).to(dtype))


def make_inputs(
    plan: Plan, B: int, t: int, H: int, W: int, crops: int = 1
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Guidance maps and a chunk."""
    dtype, channels = plan.head.dtype, plan.decoder[0].phases.shape[3]
    guidance = [
        torch.randn(crops, stage.conv.shape[0], scale * H, scale * W).to(dtype)
        for stage, scale in zip(plan.decoder, (2, 4), strict=True)
    ]
    x = torch.randn(B, t, H * W, channels).to(dtype)
    return (guidance[0], guidance[1]), x


def check(plan: Plan, guidance: tuple[Tensor, Tensor], x: Tensor, resolution: tuple[int, int]) -> None:
    truth = stages.decode(upcast(plan), upcast(guidance), upcast(x), resolution)
    eager = stages.decode(plan, guidance, x, resolution)
    assert_no_worse_than_eager(decoder.decode(plan, guidance, x, resolution), eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "t", "crops"), [(1, 1, 1), (2, 3, 2), (1, 7, 1)])
def test_matches_plain_torch(B: int, t: int, crops: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plan = make_plan(128, (64, 32), dtype)
    check(plan, *make_inputs(plan, B, t, 6, 10, crops), (6, 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch_at_the_published_sizes(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plan = make_plan(128, (64, 32), dtype)
    check(plan, *make_inputs(plan, 1, 1, 24, 24), (24, 24))
