"""The kernels of the Triton decoder, layer by layer, against plain torch."""

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

from catseg_fast.kernels.decoder import boxes, patches, row_phases, rows
from catseg_fast.kernels.decoder.group_norm import GroupNorm
from catseg_fast.kernels.decoder.layers import Layer, layers, pack, unpack
from support.accuracy import assert_no_worse_than_eager

DTYPES = (torch.float32, torch.float16)  # the interpreter computes bf16 incorrectly
PHASES_1, CONV_1, PHASES_2, CONV_2, HEAD = layers(24, 24, 128, (64, 32))

pytestmark = pytest.mark.usefixtures("on_gpu")


class Case:
    """Random arguments of a layer, as its kernel reads them and as plain torch does."""

    def __init__(
        self,
        layer: Layer,
        B: int,
        t: int,
        dtype: torch.dtype,
        seed: int = 0,
        guidance_crops: int | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.layer, self.B, self.t, self.dtype = layer, B, t, dtype
        CI, CO, K = layer.channels_in, layer.channels_out, layer.taps
        fan_in = CI * K**2
        shape = (CO, CI, 3, 3) if layer.scale == 1 else (2, 2, CO, CI, 2, 2)
        self.weight = (torch.randn(shape) * fan_in**-0.5).to(dtype)
        self.x = torch.randn(B, t, layer.height, layer.width, CI).to(dtype)
        self.guidance = None
        if layer.scale == 2:
            self.guidance = torch.randn(guidance_crops or B, layer.phases * layer.pixels, CO).to(dtype)
        self.bias = torch.randn(1).to(dtype) if CO == 1 else None
        self.norm = self.bordered = None
        if layer.normalised:
            sign = torch.where(torch.rand(CI) < 0.3, -1.0, 1.0)
            scale = (0.5 + torch.rand(B, t, CI)) * sign
            wide = torch.float16 if dtype == torch.float16 else torch.float32
            self.norm = torch.stack([scale, 0.5 * torch.randn(B, t, CI)], 2).to(wide)
            border = (-sign * math.inf).to(dtype)
            self.bordered = border.expand(B, t, layer.height + 2, layer.width + 2, CI).clone()
            self.bordered[:, :, 1:-1, 1:-1] = self.x
        groups = max(1, CO // 16)
        self.group_norm = GroupNorm(torch.randn(CO).to(dtype), torch.randn(CO).to(dtype), groups, 1e-5)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of all kernels: input, weight, addend, norm."""
        x = self.x if self.bordered is None else self.bordered
        weight = self.weight.flatten(0, -4).permute(0, 2, 3, 1)
        return x, pack(weight, self.layer.scale, self.layer.group), self.addend, self.norm

    @property
    def addend(self) -> Tensor | None:
        return self.guidance if self.bias is None else self.bias


def plain(case: Case, dtype: torch.dtype) -> Tensor:
    """Return the layer's output `[B, t, S*H, S*W, out]` in plain torch and a type."""
    layer, (B, t, H, W, CI) = case.layer, case.x.shape
    x, weight = case.x.to(dtype), case.weight.to(dtype)
    if case.norm is not None:
        scale, shift = (case.norm[:, :, i, None, None].to(dtype) for i in range(2))
        x = F.relu(x * scale + shift)
    maps = x.view(B * t, H, W, CI).permute(0, 3, 1, 2)
    if layer.scale == 1:
        y = F.conv2d(maps, weight, padding=1)
    else:
        y = maps.new_empty(B * t, layer.channels_out, 2 * H, 2 * W)
        for a in range(2):
            for b in range(2):
                y[:, :, a::2, b::2] = F.conv2d(maps, weight[a, b], padding=1)[:, :, a : a + H, b : b + W]
    y = y.permute(0, 2, 3, 1).unflatten(0, (B, t))
    if case.guidance is not None:
        y = y + case.guidance.to(dtype).view(-1, 1, *y.shape[2:])
    return y if case.bias is None else y + case.bias.to(dtype)


def plain_norm(case: Case, y: Tensor) -> Tensor:
    """Return the normalised output."""
    weight, bias, groups, eps = case.group_norm
    maps = y.flatten(0, 1).permute(0, 3, 1, 2)
    maps = F.group_norm(maps, groups, weight.to(y.dtype), bias.to(y.dtype), eps)
    return maps.permute(0, 2, 3, 1).view(y.shape)


def check(case: Case, found: tuple[Tensor, Tensor | None]) -> None:
    """Compare a kernel's result with plain torch: the output, the normalised output, and its border."""
    out, norm = found
    truth, eager = plain(case, torch.float64), plain(case, case.dtype)
    if norm is None:
        return assert_no_worse_than_eager(out, eager, truth)
    assert_no_worse_than_eager(out[:, :, 1:-1, 1:-1], eager, truth)
    normalised = out * norm[:, :, 0, None, None] + norm[:, :, 1, None, None]
    inside = normalised[:, :, 1:-1, 1:-1].to(case.dtype)
    assert_no_worse_than_eager(inside, plain_norm(case, eager), plain_norm(case, truth))
    outside = F.relu(normalised)
    outside[:, :, 1:-1, 1:-1] = 0
    assert torch.equal(outside, torch.zeros_like(outside))
    return None


def run(case: Case, kernel: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Run a kernel with its default config."""
    x, weight, addend, norm = case.arguments
    if kernel is rows:
        return rows.KERNEL(x, weight, norm, case.group_norm, case.layer)
    if kernel in (boxes, row_phases):
        return kernel.KERNEL(x, weight, addend, norm, case.group_norm, case.layer)
    group_norm = None if case.bias is not None else case.group_norm
    options = {"input_precision": "ieee", **options}
    return patches.KERNEL(x, weight, addend, norm, group_norm, case.layer, **options)


ROWS = [
    (CONV_2, rows),
    (replace(CONV_2, height=4, width=32), rows),
    (replace(CONV_2, height=16, width=48), rows),
]
ROWS += [(replace(CONV_2, height=8, width=16, channels_in=16, channels_out=16), rows)]
ROW_PHASES = [
    (replace(PHASES_2, height=height, width=width), row_phases) for height, width in [(4, 16), (8, 24)]
]
ROW_PHASES += [(PHASES_2, row_phases), (replace(PHASES_2, height=4, width=16, channels_in=32), row_phases)]
BOXES = [(PHASES_1, boxes), (CONV_1, boxes), (replace(PHASES_1, height=8, width=8), boxes)]
BOXES += [(replace(PHASES_1, height=4, width=8, channels_in=32, channels_out=16), boxes)]
BOXES += [(replace(CONV_1, height=8, width=32), boxes), (replace(CONV_1, height=16, width=8), boxes)]


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [*ROWS, *ROW_PHASES, *BOXES],
    ids=lambda value: getattr(value, "__name__", "").split(".")[-1],
)
def test_16_bit_kernels_match_plain_torch(layer: Layer, kernel: Any) -> None:
    case = Case(layer, 1, 2, torch.float16)
    check(case, run(case, kernel))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layer", [PHASES_1, CONV_1, PHASES_2, CONV_2, HEAD], ids=lambda layer: str(layer.sizes())
)
def test_patches_match_plain_torch(layer: Layer, dtype: torch.dtype) -> None:
    case = Case(layer, 1, 2, dtype)
    check(case, run(case, patches))


@pytest.mark.usefixtures("default_configs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layer", [PHASES_1, CONV_1, PHASES_2, CONV_2, HEAD], ids=lambda layer: str(layer.sizes())
)
def test_patches_match_plain_torch_with_the_default_configs(layer: Layer, dtype: torch.dtype) -> None:
    case = Case(replace(layer, height=layer.height // 4, width=layer.width // 4), 1, 2, dtype)
    check(case, run(case, patches))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_patches_match_plain_torch_at_random_sizes(data: st.DataObject) -> None:
    numbers = {
        name: data.draw(st.integers(1, limit), name) for name, limit in (("H", 6), ("W", 14), ("t", 2))
    }
    scale = data.draw(st.sampled_from([1, 2]), "scale")
    head = scale == 1 and data.draw(st.booleans(), "head")
    CO = 1 if head else data.draw(st.sampled_from([3, 8, 20, 33]), "out")
    layer = Layer(
        numbers["H"],
        numbers["W"],
        data.draw(st.sampled_from([3, 16, 24, 65]), "in"),
        CO,
        scale,
        normalised=scale == 1 or data.draw(st.booleans(), "normalised"),
        group=(4, 6) if head else (1, 1),
    )
    case = Case(layer, 2, numbers["t"], torch.float32)
    case.group_norm = case.group_norm._replace(groups=1)
    depths = [depth for depth in (16, 32, 128) if layer.patch[1] * layer.block_in % depth == 0]
    config = patches.PatchesConfig(
        data.draw(st.sampled_from([16, 64]), "groups"),
        data.draw(st.sampled_from([16, layer.block_out]), "outputs"),
        data.draw(st.sampled_from(depths), "depth"),
        num_warps=4,
        num_stages=1,
    )
    x, weight, addend, norm = case.arguments
    group_norm = None if head else case.group_norm
    found = patches.launch(x, weight, addend, norm, group_norm, layer, input_precision="ieee", config=config)
    check(case, found)


def test_boxes_take_classes_that_fill_no_tile() -> None:
    """An odd number of them in pairs; one guidance map for two crops."""
    layer = replace(PHASES_1, height=8, width=8, channels_in=16, channels_out=16)
    for B, t in ((2, 1), (2, 3), (1, 33)):
        case = Case(layer, B, t, torch.float16, guidance_crops=1)
        check(case, run(case, boxes))


def test_boxes_take_strides_and_offsets_beyond_32_bits() -> None:
    layer = replace(PHASES_1, height=4, width=8, channels_in=16, channels_out=16)
    case = Case(layer, 3, 2, torch.float16)
    expected, _ = run(case, boxes)
    far = torch.empty(2**31 + case.x.numel(), dtype=torch.float16)  # little of which is ever touched
    case.x = far.as_strided(case.x.shape, (2**30, 1024, 128, 16, 1)).copy_(case.x)
    found, _ = run(case, boxes)
    assert torch.equal(found, expected)


def test_a_destination_may_be_beyond_32_bits() -> None:
    layer = replace(HEAD, height=5, width=7, channels_in=16)
    case = Case(layer, 3, 1, torch.float16)
    expected, _ = run(case, patches)
    far = torch.empty(2**31 + expected.numel(), dtype=torch.float16)  # little of which is ever touched
    out = far.as_strided(expected.shape, (2**30, 35, 7, 1, 1))
    found, _ = run(case, patches, out=out)
    assert torch.equal(found, expected)
    assert found.data_ptr() == far.data_ptr()


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        (replace(PHASES_1, height=4, width=8, channels_in=16, channels_out=16), boxes),
        (replace(CONV_1, height=8, width=16, channels_in=16, channels_out=16), boxes),
        (replace(PHASES_2, height=4, width=16, channels_in=16, channels_out=16), row_phases),
        (replace(CONV_2, height=4, width=16, channels_in=16, channels_out=16), rows),
        (replace(CONV_2, height=5, width=3, channels_in=16, channels_out=16), patches),
        (replace(HEAD, height=5, width=7, channels_in=16), patches),
    ],
    ids=["boxes", "boxes, normalised", "row_phases", "rows", "patches", "head"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_is_deterministic_and_nan_stays_in_its_class(layer: Layer, kernel: Any) -> None:
    case = Case(layer, 1, 3, torch.float16)
    first, second = run(case, kernel), run(case, kernel)
    for found, again in zip(first, second, strict=True):
        assert found is None or again is None or torch.equal(found, again)
    maps = case.x if case.bordered is None else case.bordered
    maps[0, 1, 2, 2, 3] = math.nan
    out, norm = run(case, kernel)
    for changed, before in ((out, first[0]), (norm, first[1])):
        if changed is not None and before is not None:
            assert changed[0, 1].isnan().any()
            assert torch.equal(changed[0, ::2], before[0, ::2])


@pytest.mark.parametrize(("kernel", "dtype"), [(patches, torch.float32), (boxes, torch.float16)], ids=str)
def test_statistics_survive_a_large_mean(kernel: Any, dtype: torch.dtype) -> None:
    """The mean is as large as the type allows for its deviations to be resolved."""
    layer = replace(PHASES_1, height=8, width=8, channels_in=16, channels_out=16)
    case = Case(layer, 1, 2, dtype)
    assert case.guidance is not None
    case.guidance += 1e4 if dtype == torch.float32 else 64
    out, norm = run(case, kernel)
    assert norm is not None
    weight, bias, _, eps = case.group_norm
    inside = out[:, :, 1:-1, 1:-1].double()
    variance, mean = torch.var_mean(inside, dim=(2, 3, 4), correction=0, keepdim=True)
    scale = weight.double() / (variance[:, :, 0, 0] + eps).sqrt()
    torch.testing.assert_close(norm[:, :, 0].double(), scale, rtol=2e-3, atol=0)
    shift = bias.double() - mean[:, :, 0, 0] * scale
    torch.testing.assert_close(norm[:, :, 1].double(), shift, rtol=2e-3, atol=0)


def test_unpacks_what_was_packed() -> None:
    for layer in (PHASES_1, CONV_2, HEAD, replace(CONV_1, channels_in=9, channels_out=6)):
        shape = (layer.phases * layer.channels_out, layer.taps, layer.taps, layer.channels_in)
        weight = torch.randn(shape)
        packed = pack(weight, layer.scale, layer.group)
        assert packed.shape == layer.packed
        assert torch.equal(unpack(packed, layer), weight)
