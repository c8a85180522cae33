"""Limits of a GPU that the interpreter does not have: grids, 32-bit offsets and alignment; and NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels import OPS, load
from catseg_fast.kernels.class_attention import op as class_attention
from catseg_fast.kernels.cost_volume import op as cost_volume
from catseg_fast.kernels.decoder import op as decoder
from catseg_fast.kernels.launch.launcher import record
from catseg_fast.kernels.launch.op import Form, Random, Sizes
from catseg_fast.kernels.window_attention import qkv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AXES = (2**31 - 1, 65535, 65535)  # the most programs along each


def make(op: str, sizes: Sizes, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return load(op).make_inputs(sizes, Random(dtype, DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("name", [name for name in OPS if name != "update_label_map"])
def test_grids_of_many_classes(name: str, prompts: int, dtype: torch.dtype) -> None:
    sizes = Sizes(5, 200_000, 4, 4, prompts=prompts, window=2, decoder=(32, 16))
    for capability in (80, 90):
        _, launches = load(name).dry_run(sizes, dtype, "ieee", capability)
        for launch in launches:
            grid = (*launch.grid, 1, 1)[:3]
            assert all(0 < size <= most for size, most in zip(grid, AXES, strict=True)), launch.kernel


def test_programs_of_more_classes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make("window_block", Sizes(2, 7, 2, 4, channels=16, heads=1, window=2, hidden=16))
    config = qkv.QKVConfig(16, 16, 2, num_warps=1, num_stages=1)
    arguments = (inputs["x"], inputs["qkv"], inputs["query_key"])
    expected = qkv.launch(*arguments, input_precision="ieee", config=config)
    monkeypatch.setattr(qkv, "GROUPS", 4)
    with record() as launches:
        found = qkv.launch(*arguments, input_precision="ieee", config=config)
    assert launches[0].grid == (1, 1, 4)
    assert torch.equal(found, expected)


def test_launches_on_the_gpu_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, which cannot read the memory of another one."""
    current, launched = [0], []

    @contextmanager
    def device(gpu: torch.device) -> Iterator[None]:
        current.append(gpu.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr("catseg_fast.kernels.launch.op.capability_of", lambda device: 90)
    form = Form(lambda x: launched.append((x.device.index, current[-1])))
    for index in (0, 1, 0):
        replace(decoder.OP, forms=(form,)).launch(SimpleNamespace(device=torch.device("cuda", index)))
    assert launched == [(0, 0), (1, 1), (0, 0)]


def apart(x: Tensor, dimension: int, distance: int = 2**30) -> Tensor:
    """A copy whose elements are far apart along a dimension, in memory that is hardly ever touched."""
    strides = [stride * (size > 1) for stride, size in zip(x.stride(), x.shape, strict=True)]
    strides[dimension] = distance
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=DEVICE).copy_(x)


@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize("pooling", [(1, 1), (1, 2)])
def test_class_attention_of_positions_far_apart(pooling: tuple[int, int]) -> None:
    sizes = Sizes(1, 2, 2, 2, channels=16, heads=1, hidden=16, pooling=pooling)
    for op in (class_attention.COLLECT, class_attention.APPLY):
        inputs = make(op.name, sizes)
        far = {**inputs, "x": apart(inputs["x"], 2)}
        found, expected = (op.triton(**arguments) for arguments in (far, inputs))
        pairs = zip(found, expected, strict=True) if op is class_attention.COLLECT else [(found, expected)]
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize(("name", "dimension", "prompts"), [("image", 1, 1), ("image", 1, 3), ("text", 2, 3)])
def test_cost_volume_of_features_far_apart(name: str, dimension: int, prompts: int) -> None:
    inputs = make("embed_cost_volume", Sizes(1, 2, 2, 2, channels=16, features=16, prompts=prompts))
    far = {**inputs, name: apart(inputs[name].contiguous(), dimension)}
    assert torch.equal(cost_volume.embed_cost_volume(**far), cost_volume.embed_cost_volume(**inputs))


@pytest.mark.usefixtures("default_configs")
def test_decoder_weights_in_the_middle_of_16_bytes() -> None:
    """Weights may be slices of one tensor; a tensor descriptor needs an address that is a multiple of 16."""
    inputs = make("decode", replace(decoder.OP.odd[2], classes=2))
    with record() as launches:
        expected = decoder.decode(**inputs)
    assert "boxes_kernel" in {launch.kernel.__name__ for launch in launches}
    shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x) for x in inputs["weights"]]
    found = decoder.decode(**{**inputs, "weights": shifted})
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


SMALL = {
    "embed_cost_volume": (Sizes(1, 3, 3, 4, 16, features=20), Sizes(1, 2, 2, 3, 7, features=9, prompts=3)),
    "window_block": (Sizes(1, 1, 2, 4, 32, heads=2, window=2, shift=1, hidden=48),),
    "class_collect": (Sizes(1, 3, 1, 2, 32, 2, streamed=True), Sizes(1, 3, 2, 2, 48, 3, pooling=(2, 2))),
    "class_apply": (Sizes(1, 3, 1, 2, 32, 2, hidden=48), Sizes(1, 3, 2, 2, 48, 3, pooling=(2, 2))),
    "decode": (Sizes(1, 1, 8, 8, 16, decoder=(16, 16)),),
    "update_label_map": (Sizes(5, 2, 2, 2), Sizes(1, 2, 2, 2)),
}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [pytest.param(name, sizes, id=f"{name}-{i}") for name in OPS for i, sizes in enumerate(SMALL[name])],
)
def test_nan_in_any_input_is_seen(name: str, sizes: Sizes) -> None:
    """The result is NaN where torch's is."""
    op, inputs = load(name), make(name, sizes)
    tensors = [x for value in inputs.values() for x in (value if isinstance(value, list) else [value])]
    copies = inputs["weights"][-2] if name == "decode" else None  # packed: it holds 24 copies of each number
    for x in tensors:
        if x is copies or not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        first = (0,) * x.ndim
        before = x[first].clone()
        x[first] = torch.nan
        found, expected = (call(**inputs) for call in (op.triton, op.plain))
        x[first] = before
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        nan = [(ours.isnan(), theirs.isnan()) for ours, theirs in pairs]
        assert any(ours.any() for ours, _ in nan)
        assert all((ours >= theirs).all() for ours, theirs in nan)


@triton.jit
def largest_kernel(x_ptr, y_ptr, out_ptr):
    x, y = tl.load(x_ptr), tl.load(y_ptr)
    tl.store(out_ptr, tl.maximum(x, y))
    tl.store(out_ptr + 1, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def divide_kernel(x_ptr, y_ptr, out_ptr):
    x, y = tl.load(x_ptr), tl.load(y_ptr)
    tl.store(out_ptr, x // y)
    tl.store(out_ptr + 1, x % y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_maximum_drops_nan_unless_told_not_to(dtype: torch.dtype) -> None:
    """So does a GPU: tests of NaN mean something in the interpreter."""
    one, nan = (torch.tensor([value], dtype=dtype, device=DEVICE) for value in (1.0, torch.nan))
    for pair in ((one, nan), (nan, one)):
        out = torch.empty(2, dtype=dtype, device=DEVICE)
        largest_kernel[(1,)](*pair, out)
        assert out[0] == 1
        assert out[1].isnan()


def test_integers_are_divided_towards_zero() -> None:
    """So does a GPU, unlike Python."""
    x, y = (torch.tensor([value], dtype=torch.int32, device=DEVICE) for value in (-7, 2))
    out = torch.empty(2, dtype=torch.int32, device=DEVICE)
    divide_kernel[(1,)](x, y, out)
    assert out.tolist() == [-3, -1]
