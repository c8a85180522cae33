"""Class attention in Triton against `stages` at float64: no worse than twice the stages' own error."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine import triton_stages
from catseg_fast.engine.arguments import apply_weights
from catseg_fast.engine.class_memory import FullMemory, LinearMemory
from catseg_fast.engine.folding import ClassLayer
from catseg_fast.kernels.class_attention import apply, collect
from catseg_fast.kernels.launch.capability import CAPABILITIES
from catseg_fast.kernels.launch.configs import Problem
from support.accuracy import assert_no_worse_than_eager, upcast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


def make_layer(C: int = 128, heads: int = 4, hidden: int = 512, **changes: Any) -> ClassLayer:
    """Return a layer with weights of the scale of a trained one, in float64."""
    generator = torch.Generator().manual_seed(C + hidden)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / columns**0.5

    def bias(size: int) -> Tensor:
        return 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)

    layer = ClassLayer(
        heads=heads, linear=True, eps=1e-6, pooling=None, pad_len=0, q=matrix(C, C), q_bias=bias(C),
        kv=matrix(2 * C, C), kv_bias=bias(2 * C), text=None, padding=None, fc1=matrix(hidden, C),
        fc1_bias=bias(hidden), fc2=matrix(C, hidden), fc2_bias=bias(C),
    )  # fmt: skip
    return replace(layer, **changes)


def cast(layer: ClassLayer, dtype: torch.dtype) -> ClassLayer:
    """Return the layer with its tensors in `dtype`, on the device of the tests."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{k: v.to(DEVICE, dtype) for k, v in values.items() if isinstance(v, Tensor)})


def make_inputs(B: int, t: int, positions: int, C: int, text_crops: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return x `[B, t, HW, C]`, and the text terms of keys and queries `[text_crops, t, C]`."""
    generator = torch.Generator().manual_seed(1000 * B + t)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(B, t, positions, C), normal(text_crops, t, C), normal(text_crops, t, C)


def run(
    functions: Any,
    layer: ClassLayer,
    chunks: list[tuple[Tensor, Tensor | None, Tensor | None]],
    resolution: tuple[int, int],
    *options: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run both passes over chunks of (x, text_key, text_query); return means, key_sum, and all outputs."""
    memory = LinearMemory.new(layer, sum(x.shape[1] for x, _, _ in chunks))
    for index, (x, text_key, _) in enumerate(chunks):
        last = index == len(chunks) - 1
        functions.class_collect(layer, memory, x, text_key, resolution, last, *options)
    out = [functions.class_apply(layer, x, text, memory, resolution, *options) for x, _, text in chunks]
    return *memory.closed(), torch.cat(out, dim=1)


def check(
    layer: ClassLayer,
    chunks: list[tuple[Tensor, Tensor | None, Tensor | None]],
    resolution: tuple[int, int],
    dtype: torch.dtype,
    input_precision: str = "ieee",
) -> None:
    """Check the rule of `accuracy.py`, for `layer` and `chunks` rounded to `dtype`."""
    layer = cast(layer, dtype)
    chunks = [tuple(x if x is None else x.to(DEVICE, dtype) for x in chunk) for chunk in chunks]
    truth = run(stages, *upcast((layer, chunks)), resolution)
    eager = run(stages, layer, chunks, resolution)
    ours = run(triton_stages, layer, chunks, resolution, input_precision)
    for tensors in zip(ours, eager, truth, strict=True):
        assert_no_worse_than_eager(*tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "t", "resolution"),
    [(1, 1, (2, 3)), (2, 2, (6, 2)), (2, 3, (5, 5)), (3, 7, (3, 3)), (1, 33, (4, 3))],
)
def test_matches_stages(B: int, t: int, resolution: tuple[int, int], dtype: torch.dtype) -> None:
    x, text_key, text_query = make_inputs(B, t, resolution[0] * resolution[1], 128)
    check(make_layer(), [(x, text_key, text_query)], resolution, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("C", "heads", "hidden"),
    [(16, 1, 64), (48, 3, 80), (96, 4, 384), (64, 8, 256), (160, 5, 96), (256, 8, 1024)],
)
def test_other_sizes(C: int, heads: int, hidden: int, dtype: torch.dtype) -> None:
    x, text_key, text_query = make_inputs(2, 3, 12, C)
    check(make_layer(C, heads, hidden), [(x, text_key, text_query)], (4, 3), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pooling", "resolution"), [((2, 2), (12, 8)), ((2, 3), (7, 8)), ((4, 4), (4, 7))])
def test_pooling(pooling: tuple[int, int], resolution: tuple[int, int], dtype: torch.dtype) -> None:
    x, text_key, text_query = make_inputs(2, 5, resolution[0] * resolution[1], 64)
    layer = make_layer(64, 4, 128, pooling=pooling)
    check(layer, [(x, text_key, text_query)], resolution, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_chunks_and_padding(padded: bool, dtype: torch.dtype) -> None:
    padding = torch.randn(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = make_layer(64, 4, 128, **({"pad_len": 256, "padding": padding} if padded else {}))
    parts = [make_inputs(2, t, 6, 64) for t in (3, 1, 7)]
    check(layer, parts, (2, 3), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_text_and_with_text_of_each_crop(dtype: torch.dtype) -> None:
    layer = make_layer(64, 4, 128)
    x, text_key, text_query = make_inputs(3, 5, 12, 64, text_crops=3)
    check(layer, [(x, None, None)], (3, 4), dtype)
    check(layer, [(x, text_key, text_query)], (3, 4), dtype)


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, -9.0), (30.0, 0.0)])
def test_range_of_fp16(scale: float, shift: float) -> None:
    """Keys near 1e-4 or 100: what the kernels round stays in range (the stages' own outputs do not)."""
    layer = make_layer(64, 4, 128)
    layer = replace(layer, kv=layer.kv * scale, kv_bias=layer.kv_bias * scale + shift)
    x, text_key, text_query = make_inputs(2, 40, 12, 64)
    layer, chunk = (
        cast(layer, torch.float16),
        [y.to(DEVICE, torch.float16) for y in (x, text_key * scale, text_query)],
    )
    truth = run(stages, cast(layer, torch.float64), [tuple(y.double() for y in chunk)], (3, 4))
    for found, exact in zip(run(triton_stages, layer, [tuple(chunk)], (3, 4)), truth, strict=True):
        assert (found.double() - exact).norm() < 2e-3 * exact.norm()


def test_matches_stages_at_the_published_resolution() -> None:
    x, text_key, text_query = make_inputs(1, 2, 576, 128)
    check(make_layer(), [(x, text_key, text_query)], (24, 24), torch.float16)


@pytest.mark.parametrize("input_precision", ["ieee", "tf32x3"])
def test_precision_of_fp32(input_precision: str) -> None:
    x, text_key, text_query = make_inputs(1, 9, 6, 128)
    check(make_layer(), [(x, text_key, text_query)], (2, 3), torch.float32, input_precision)


def test_strided_views() -> None:
    layer = cast(make_layer(64, 4, 128), torch.float32)
    x, text_key, text_query = (x.to(DEVICE, torch.float32) for x in make_inputs(2, 5, 4, 64))
    apart = torch.full((2, 11, 2, 4, 80), torch.nan, device=DEVICE)[:, 3:8, 1, :, 8:72]
    text = torch.full((1, 9, 192), torch.nan, device=DEVICE)[:, 2:7, 64:128]
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    expected = run(triton_stages, layer, [(x, text_key, text_query)], (2, 2))
    for view, view_of_text in ((apart, text), (transposed, text)):
        view_of_text.copy_(text_key)
        view.copy_(x)
        found = run(triton_stages, layer, [(view, view_of_text, text_query)], (2, 2))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("overflow_checks")
def test_offsets_beyond_two_billion() -> None:
    """The memory between classes is never touched."""
    layer = cast(make_layer(16, 1, 32), torch.float16)
    x, *_ = (y.to(DEVICE, torch.float16) for y in make_inputs(1, 3, 4, 16))
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided(x.shape, (0, 2**30, 16, 1))
    far.copy_(x)
    expected, found = (run(triton_stages, layer, [(y, None, None)], (2, 2)) for y in (x, far))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_same_bits_every_time_and_classes_in_any_order() -> None:
    layer = cast(make_layer(64, 4, 128), torch.float16)
    x, text_key, text_query = (x.to(DEVICE, torch.float16) for x in make_inputs(2, 9, 4, 64))
    chunk = (x, text_key, text_query)
    first, second = (run(triton_stages, layer, [chunk], (2, 2)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    (*_, permuted) = run(triton_stages, layer, [tuple(x[:, order] for x in chunk)], (2, 2))
    torch.testing.assert_close(permuted, first[2][:, order], rtol=2e-3, atol=2e-3)


def problem(dtype: torch.dtype) -> Problem:
    return Problem.of("", "", apply.ApplyConfig, torch.empty(1, 1, dtype=dtype), "ieee", channels=128)


APPLY_CONFIGS, COLLECT_CONFIGS = (
    {
        module.default_config(capability, problem(dtype))
        for capability in CAPABILITIES
        for dtype in (torch.float16, torch.float32)
    }
    for module in (apply, collect)
)


@pytest.mark.parametrize("config", sorted(APPLY_CONFIGS, key=str), ids=str)
def test_apply_at_every_default_config(config: apply.ApplyConfig) -> None:
    layer = cast(make_layer(128, 4, 512), torch.float32)
    x, text_key, text_query = (x.to(DEVICE, torch.float32) for x in make_inputs(1, 67, 3, 128))
    chunks = [(x, text_key, text_query)]
    means, key_sum, eager = run(stages, layer, chunks, (1, 3))
    found = apply.launch(
        x, text_query, means, key_sum, *apply_weights(layer), 4, 67, layer.eps, (1, 3), (1, 1),
        input_precision="ieee", config=config,
    )  # fmt: skip
    *_, truth = run(stages, *upcast((layer, chunks)), (1, 3))
    assert_no_worse_than_eager(found, eager, truth)


@pytest.mark.parametrize("config", sorted(COLLECT_CONFIGS, key=str), ids=str)
def test_collect_at_every_default_config(config: collect.CollectConfig) -> None:
    layer = cast(make_layer(128, 4, 128), torch.float32)
    x, text_key, text_query = (x.to(DEVICE, torch.float32) for x in make_inputs(1, 35, 9, 128))
    expected = run(triton_stages, layer, [(x, text_key, text_query)], (3, 3))
    found = collect.launch(
        x, layer.kv, layer.kv_bias, text_key, None, None, 4, 35, (3, 3), (1, 1), True,
        input_precision="ieee", config=config,
    )  # fmt: skip
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_says_what_it_does_not_support() -> None:
    layer = make_layer()
    assert triton_stages.unsupported_classes(layer) is None
    assert "softmax" in str(triton_stages.unsupported_classes(replace(layer, linear=False)))
    assert "40 channels" in str(triton_stages.unsupported_classes(make_layer(40, 4)))
    assert triton_stages.unsupported_classes(make_layer(256, 4)) is None
    assert "at most 64 per head" in str(triton_stages.unsupported_classes(make_layer(128, 1)))


def test_bad_arguments() -> None:
    layer = cast(make_layer(32, 2, 64), torch.float32)
    x, text, *_ = (x.to(DEVICE, torch.float32) for x in make_inputs(2, 3, 6, 32))
    memory = LinearMemory.new(layer, 3)

    def collect(
        x: Tensor = x,
        text: Tensor | None = text,
        memory: Any = memory,
        layer: ClassLayer = layer,
        resolution: tuple[int, int] = (2, 3),
    ) -> None:
        triton_stages.class_collect(layer, memory, x, text, resolution)

    with pytest.raises(ValueError, match=r"x: has shape \[2, 3, 6, 32\]; expected \[B, t, 8, C\] for"):
        collect(resolution=(2, 4))
    with pytest.raises(ValueError, match=r"x: has shape \[3, 6, 32\]"):
        collect(x[0])
    with pytest.raises(ValueError, match="above 0"):
        collect(x[:, :0], None)
    with pytest.raises(ValueError, match=r"text_key: has shape \[1, 2, 32\]; expected \[1 or 2, 3, 32\]"):
        collect(text=text[:, :2])
    with pytest.raises(ValueError, match=r"text_key: is torch.float16; expected torch.float32"):
        collect(text=text.half())
    with pytest.raises(ValueError, match="text_key: has strides"):
        collect(text=torch.zeros(1, 3, 64, device=DEVICE)[:, :, ::2])
    with pytest.raises(ValueError, match=r"weight: is torch.float32; expected torch.float16"):
        collect(x.half(), None)
    with pytest.raises(ValueError, match=r"weight: has strides"):
        collect(layer=replace(layer, kv=layer.kv.t().contiguous().t()))
    with pytest.raises(ValueError, match=r"x: dtype torch.float64"):
        collect(x.double(), None)
    with pytest.raises(ValueError, match=r"memory: FullMemory has no kernel"):
        collect(memory=FullMemory.new(layer, 3))
    with pytest.raises(ValueError, match="layer: softmax attention"):
        collect(layer=replace(layer, linear=False))
    with pytest.raises(ValueError, match=r"key_sum: has shape \[1, 6, 2, 16\]; expected \[2, 6, 2, 16\]"):
        collect(memory=replace(memory, key_sum=torch.zeros(1, 6, 2, 16, device=DEVICE)))
    with pytest.raises(ValueError, match="pooling: 3x3 is larger"):
        collect(layer=replace(layer, pooling=(3, 3)))
    with pytest.raises(ValueError, match="memory: is not closed, or no class was added"):
        triton_stages.class_apply(layer, x, None, memory, (2, 3))
    with pytest.raises(ValueError, match="input_precision: 'tf64' is not"):
        triton_stages.class_collect(layer, memory, x, None, (2, 3), False, "tf64")
    triton_stages.class_collect(layer, memory, x, None, (2, 3), last=True)
    transposed = replace(layer, fc2=layer.fc2.t().contiguous().t())
    with pytest.raises(ValueError, match=r"fc2: has strides"):
        triton_stages.class_apply(transposed, x, None, memory, (2, 3))


def test_a_failed_step_leaves_the_memory_as_it_was() -> None:
    layer = cast(make_layer(32, 2, 64), torch.float32)
    x, *_ = (x.to(DEVICE, torch.float32) for x in make_inputs(2, 3, 6, 32))
    memory = LinearMemory.new(layer, 6)
    triton_stages.class_collect(layer, memory, x, None, (2, 3))
    before = memory.key_value
    assert isinstance(before, Tensor)
    copy = before.clone()
    triton_stages.class_collect(layer, memory, x, None, (2, 3))
    assert torch.equal(before, copy)
    assert memory.key_value is not before
