"""The Triton decoder against its plain torch counterpart, `stages.decode`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.arguments import channels_last
from catseg_fast.engine.folding import DecoderStage, Normalisation, Plan
from catseg_fast.engine.triton_stages import kernel_decoding
from catseg_fast.kernels.decoder import op as decoder
from support.accuracy import assert_classes_are_apart, assert_no_worse_than_eager, upcast

DTYPES = (torch.float32, torch.float16)  # the interpreter computes bf16 incorrectly

pytestmark = pytest.mark.usefixtures("on_gpu")


def make_plan(channels: int, stage_channels: tuple[int, int], dtype: torch.dtype, group: int = 16) -> Plan:
    """Return random decoder weights of a trained model's scale; the rest of the plan is empty."""

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
                bias=empty,
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
    """Return guidance maps and a chunk."""
    dtype, channels = plan.head.dtype, plan.decoder[0].phases.shape[3]
    guidance = [
        torch.randn(crops, stage.conv.shape[0], scale * H, scale * W).to(dtype)
        for stage, scale in zip(plan.decoder, (2, 4), strict=True)
    ]
    x = torch.randn(B, t, H * W, channels).to(dtype)
    return (guidance[0], guidance[1]), x


def decode(plan: Plan, guidance: tuple[Tensor, Tensor], x: Tensor, resolution: tuple[int, int]) -> Tensor:
    maps = [channels_last(added) for added in guidance]
    return decoder.decode(x, maps, *kernel_decoding(plan), resolution)


def check(plan: Plan, guidance: tuple[Tensor, Tensor], x: Tensor, resolution: tuple[int, int]) -> None:
    truth = stages.decode(upcast(plan), upcast(guidance), upcast(x), resolution)
    eager = stages.decode(plan, guidance, x, resolution)
    assert_no_worse_than_eager(decode(plan, guidance, x, resolution), eager, truth)


@pytest.mark.usefixtures("default_configs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch_with_the_default_configs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plan = make_plan(128, (64, 32), dtype)
    check(plan, *make_inputs(plan, 1, 2, 6, 6), (6, 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "t", "crops", "H", "W"), [(1, 1, 1, 24, 24), (2, 3, 2, 5, 8), (2, 1, 1, 8, 5), (1, 7, 1, 4, 4)]
)
def test_matches_plain_torch(B: int, t: int, crops: int, H: int, W: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plan = make_plan(128, (64, 32), dtype)
    check(plan, *make_inputs(plan, B, t, H, W, crops), (H, W))


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_matches_plain_torch_at_random_sizes(data: st.DataObject) -> None:
    torch.manual_seed(2)
    group = data.draw(st.sampled_from([3, 8, 16]), "channels a group")
    multiple = st.integers(1, 4).map(lambda factor: factor * group)
    channels, first, second = (data.draw(multiple, name) for name in ("C", "out 1", "out 2"))
    plan = make_plan(channels, (first, second), torch.float32, group)
    H, W, t = (data.draw(st.integers(1, limit), name) for name, limit in (("H", 4), ("W", 4), ("t", 2)))
    check(plan, *make_inputs(plan, 2, t, H, W, 2), (H, W))


def test_takes_any_strides() -> None:
    torch.manual_seed(3)
    plan = make_plan(32, (32, 16), torch.float32)
    (first, second), x = make_inputs(plan, 2, 2, 2, 3, 2)
    expected = decode(plan, (first, second), x, (2, 3))
    classes_apart = torch.full((2, 5, 6, 32), math.nan)
    classes_apart[:, 1::2] = x
    columns_apart = torch.full((2, 2, 6, 40), math.nan)
    columns_apart[..., 4:36] = x
    channels_last = first.contiguous(memory_format=torch.channels_last)
    for strided in (classes_apart[:, 1::2], columns_apart[..., 4:36], x.flip(0).flip(0).mT.contiguous().mT):
        assert torch.equal(decode(plan, (channels_last, second), strided, (2, 3)), expected)


@pytest.mark.usefixtures("overflow_checks")
def test_takes_offsets_beyond_32_bits() -> None:
    torch.manual_seed(4)
    plan = make_plan(16, (16, 16), torch.float16)
    guidance, x = make_inputs(plan, 3, 1, 2, 2)
    far = torch.empty(2**31 + x.numel(), dtype=torch.float16)  # little of which is ever touched
    far = far.as_strided(x.shape, (2**30, 0, 16, 1)).copy_(x)
    assert torch.equal(decode(plan, guidance, far, (2, 2)), decode(plan, guidance, x, (2, 2)))


def test_is_deterministic_and_classes_do_not_meet() -> None:
    torch.manual_seed(5)
    plan = make_plan(32, (16, 16), torch.float16)
    guidance, x = make_inputs(plan, 1, 2, 2, 3)
    assert_classes_are_apart(lambda x: decode(plan, guidance, x, (2, 3)), x)


def test_order_of_classes_does_not_matter() -> None:
    torch.manual_seed(5)
    plan = make_plan(32, (16, 16), torch.float16)
    guidance, x = make_inputs(plan, 1, 2, 2, 3)
    truth = stages.decode(upcast(plan), upcast(guidance), upcast(x), (2, 3))
    order = torch.tensor([1, 0])
    ours = decode(plan, guidance, x[:, order], (2, 3))
    eager = stages.decode(plan, guidance, x, (2, 3))
    assert_no_worse_than_eager(ours, eager[:, order], truth[:, order])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.parametrize("value", [math.nan, 6e4], ids=["nan", "overflow"])
def test_what_is_not_finite_shows_in_the_logits(value: float) -> None:
    torch.manual_seed(6)
    plan = make_plan(32, (32, 16), torch.float16)
    guidance, x = make_inputs(plan, 1, 2, 4, 4)
    x[0, 1, 5] = value
    finite = decode(plan, guidance, x, (4, 4)).isfinite().flatten(2).all(dim=2)
    assert finite.tolist() == [[True, False]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_writes_to_a_destination_and_sets_a_flag() -> None:
    torch.manual_seed(7)
    plan = make_plan(16, (16, 16), torch.float16)
    guidance, x = make_inputs(plan, 2, 2, 2, 3)
    maps = [channels_last(added) for added in guidance]
    arguments = (maps, *kernel_decoding(plan), (2, 3), "ieee")
    expected = decoder.decode(x, *arguments)
    answer = torch.full((2, 5, 8, 12), 7.0)
    flag = torch.zeros(1, dtype=torch.int32)
    found = decoder.decode(x, *arguments, out=answer[:, 1:3], flag=flag)
    assert found.data_ptr() == answer[:, 1:].data_ptr()
    torch.testing.assert_close(answer[:, 1:3].half(), expected, rtol=0, atol=0)
    assert (answer[:, [0, 3, 4]] == 7).all()
    assert flag.item() == 0
    x[1, 1, 3] = math.nan
    assert decoder.decode(x, *arguments, flag=flag)[1, 1].isnan().any()
    assert flag.item() == 1
    decoder.decode(x[:1], *arguments, flag=flag)
    assert flag.item() == 1, "what another chunk found is kept"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_the_flag_is_of_what_is_written() -> None:
    """Logits beyond fp16's range are infinite in a result in fp16, and finite in fp32."""
    torch.manual_seed(8)
    plan = make_plan(16, (16, 16), torch.float16)
    plan.head.mul_(1000)
    plan.head_bias.fill_(6.5e4)
    guidance, x = make_inputs(plan, 1, 1, 2, 2)
    arguments = ([channels_last(added) for added in guidance], *kernel_decoding(plan), (2, 2), "ieee")
    for dtype, expected in ((torch.float32, 0), (torch.float16, 1)):
        flag, out = torch.zeros(1, dtype=torch.int32), torch.empty(1, 1, 8, 8, dtype=dtype)
        decoder.decode(x, *arguments, out=out, flag=flag)
        assert flag.item() == expected
        assert out.isfinite().all() == (not expected)


def test_writes_to_a_destination_in_a_compiled_graph() -> None:
    torch.manual_seed(9)
    plan = make_plan(16, (16, 16), torch.float32)
    guidance, x = make_inputs(plan, 1, 1, 2, 2)
    arguments = ([channels_last(added) for added in guidance], *kernel_decoding(plan), (2, 2), "ieee")

    def call(x: Tensor, out: Tensor, flag: Tensor) -> Tensor:
        return decoder.decode(x, *arguments, out=out, flag=flag) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for function in (call, compiled):
        out, flag = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int32)
        assert torch.equal(function(x, out, flag), out + 1)
        found.append(out)
    assert torch.equal(*found)


@pytest.mark.usefixtures("default_configs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_a_normalisation_may_be_zero(dtype: torch.dtype) -> None:
    """There is no border that a scale of zero turns into minus infinity; a scale may also round to zero."""
    torch.manual_seed(10)
    plan = make_plan(16, (32, 16), dtype)
    for stage in plan.decoder:
        for norm in (stage.norm1, stage.norm2):
            norm.weight[:9] = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 1e-7, -3e-7, 0.0, -0.0, 1e-6])
            norm.bias[:9] = torch.tensor([1.0, 2.0, 0.5, -1.0, 0.0, 0.0, 0.0, -3.0, 1.0])
    guidance, x = make_inputs(plan, 1, 2, 4, 16)
    check(plan, guidance, 100 * x, (4, 16))
    every = replace(plan.decoder[0].norm1, weight=torch.zeros(32, dtype=dtype))
    stage = replace(plan.decoder[0], norm1=every)
    check(replace(plan, decoder=(stage, plan.decoder[1])), guidance, x, (4, 16))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_a_normalisation_with_nan_shows_in_all_logits() -> None:
    torch.manual_seed(11)
    plan = make_plan(16, (16, 16), torch.float16)
    plan.decoder[1].norm1.weight[3] = math.nan
    guidance, x = make_inputs(plan, 1, 1, 4, 4)
    assert decode(plan, guidance, x, (4, 4)).isnan().all()


def test_names_what_is_wrong() -> None:
    plan = make_plan(32, (32, 16), torch.float32)
    guidance, x = make_inputs(plan, 2, 3, 4, 4, 2)
    first, second = map(channels_last, guidance)
    weights, groups, eps = kernel_decoding(plan)

    def refused(match: str, **changes: Any) -> None:
        given = {"x": x, "guidance": (first, second), "weights": weights, "groups": groups, "eps": eps}
        with pytest.raises(ValueError, match=match):
            decoder.decode(**{**given, "resolution": (4, 4), **changes})

    refused(r"x: has shape \[2, 3, 16, 32\]; expected \[B, t, 20, C\]", resolution=(4, 5))
    refused(r"x: has shape \[2, 3, 512\]", x=x.flatten(2))
    refused(r"x: has shape \[2, 0, 16, 32\]", x=x[:, :0])
    refused(r"x: dtype torch.float64", x=x.double())
    refused(r"input_precision: 'fast'", input_precision="fast")
    refused(r"weights: has 14 items; expected 8 for 1 stages", guidance=(first,))
    refused(r"groups: has 3 items; expected 4", groups=groups[:3])
    refused(
        r"guidance\[0\]: has shape \[2, 56, 32\]; expected \[1 or 2, 64, 32\]",
        guidance=(first[:, :56], second),
    )
    refused(r"guidance\[1\]: is torch.float16; expected torch.float32", guidance=(first, second.half()))
    refused(
        r"weights\[0\]: is torch.float32; expected torch.float16",
        x=x.half(),
        guidance=(first.half(), second.half()),
    )
    refused(r"weights\[0\]: has shape \[4, 128, 32\]; expected \[4, 64, 32\]", x=x[..., :16])
    out, flag = torch.empty(2, 3, 16, 16), torch.zeros(1, dtype=torch.int32)
    refused(
        r"out: is torch.float32 \[2, 3, 8, 8\] on cpu; expected .* \[2, 3, 16, 16\]", out=out[..., :8, :8]
    )
    refused(r"out: is torch.int32", out=out.int())
    refused(r"out: has strides \[1536, 512, 32, 1\]", out=torch.empty(2, 3, 16, 32)[..., :16])
    refused(
        r"flag: is torch.int64 \[1\] on cpu; expected torch.int32 \[1\] on cpu", out=out, flag=flag.long()
    )
    refused(r"flag: is torch.int32 \[2\]", flag=flag.expand(2))
    refused(r"is on meta; expected cpu", guidance=(first.to("meta"), second))
    refused(r"x: is on meta; the Triton kernels need a CUDA tensor", x=x.to("meta"))
