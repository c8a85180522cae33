"""The kernels of the window-attention block: numbers of classes, descriptors, destinations, NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast.kernels.launch.capability import CAPABILITIES
from catseg_fast.kernels.launch.launcher import record
from catseg_fast.kernels.launch.op import Random, Sizes
from catseg_fast.kernels.window_attention import attention, mlp, op, plain, qkv
from catseg_fast.kernels.window_attention.windows import Windows
from support.accuracy import assert_no_worse_than_eager, upcast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16)  # the interpreter computes bf16 incorrectly
SMALL = Sizes(1, 2, 4, 6, channels=32, heads=2, window=2, shift=1, hidden=48)
SHARED = 227 * 1024  # bytes that a program may have on capability 90


def make(sizes: Sizes, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, Any]:
    return op.OP.make_inputs(sizes, Random(dtype, DEVICE, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 33, 64, 65, 97])
def test_any_number_of_classes(classes: int, shift: int, dtype: torch.dtype) -> None:
    crops = max(1, 48 // classes)  # the largest error of few values is a matter of chance, also for torch
    inputs = make(Sizes(crops, classes, 2, 4, channels=16, heads=1, window=2, shift=shift, hidden=32), dtype)
    truth = plain.window_block(**{name: upcast(value) for name, value in inputs.items()})
    assert_no_worse_than_eager(op.window_block(**inputs), plain.window_block(**inputs), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.usefixtures("default_configs")
def test_default_configs(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published widths, and fewer positions; 40 are not a multiple of a tile's rows."""
    monkeypatch.setattr("catseg_fast.kernels.launch.capability._assumed.capability", capability)
    inputs = make(Sizes(1, 3, 5, 10, window=5, shift=2, hidden=96), dtype)
    truth = plain.window_block(**{name: upcast(value) for name, value in inputs.items()})
    with record() as launches:
        out = op.window_block(**inputs)
    assert_no_worse_than_eager(out, plain.window_block(**inputs), truth)
    assert launches[0].constants["TMA"] == (capability >= 90 and dtype == torch.float16)


def run_qkv(inputs: dict[str, Any], x: Tensor, config: qkv.QKVConfig) -> tuple[Tensor, bool]:
    """Return the result, and whether descriptors were used."""
    with record() as launches:
        out = qkv.launch(x, inputs["qkv"], inputs["query_key"], input_precision="ieee", config=config)
    return out, launches[0].constants["TMA"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [8, 16], ids=["even", "uneven"])  # 24 positions
@pytest.mark.parametrize("guided", [True, False])
def test_descriptors_and_pointers_give_the_same_bits(guided: bool, rows: int, dtype: torch.dtype) -> None:
    inputs = make(replace(SMALL, crops=2, classes=5, guided=guided), dtype)
    config = qkv.QKVConfig(rows, 16, 2, num_warps=1, num_stages=1, tma=True)
    state = torch.full((2, 9, 24, 32), torch.nan, dtype=dtype, device=DEVICE)
    for x in (inputs["x"], state[:, 2:7].copy_(inputs["x"])):
        described, through_descriptors = run_qkv(inputs, x, config)
        pointed, through_pointers = run_qkv(inputs, x, replace(config, tma=False))
        assert through_descriptors
        assert not through_pointers
        assert torch.equal(described, pointed)
        assert not described.isnan().any()


def test_what_no_descriptor_takes_goes_by_pointers() -> None:
    inputs = make(SMALL)
    config = qkv.QKVConfig(16, 32, 2, num_warps=1, num_stages=1, tma=True)
    storage = torch.zeros(inputs["x"].numel() + 1, dtype=torch.float16, device=DEVICE)
    x = storage[1:].view_as(inputs["x"]).copy_(inputs["x"])  # begins in the middle of 16 bytes
    shared = inputs["x"][:1, :1].expand(1, 2, -1, -1)  # a stride of 0
    wide = replace(config, channels=64)  # a block would reach from queries into keys
    for case, tiles in ((x, config), (shared, config), (inputs["x"], wide)):
        out, described = run_qkv(inputs, case, tiles)
        assert not described
        assert torch.equal(out, run_qkv(inputs, case.clone(), config)[0])


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("queries", [16, 64])
def test_attention_takes_the_queries_place(queries: int, shift: int) -> None:
    """Keys and values stay; queries of all heads and windows are replaced, once."""
    torch.manual_seed(0)
    buffer = torch.randn(1, 2, 8 * 12, 3 * 32, device=DEVICE)
    before = buffer.clone()
    windows = Windows(8, 12, 4, shift)
    config = attention.AttentionConfig(queries, num_warps=1)
    assert attention.launch(buffer, windows, 2, input_precision="ieee", config=config) is buffer
    assert torch.equal(buffer[..., 32:], before[..., 32:])
    order = plain.window_order((8, 12), 4, shift, DEVICE)
    masks = plain.window_masks((8, 12), 4, shift, torch.float32, DEVICE)
    q, k, v = before[:, :, order].view(2, 6, 16, 3, 2, 16).permute(3, 1, 0, 4, 2, 5)
    for window, mask in enumerate(masks):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[window], k[window], v[window], attn_mask=mask, scale=1.0
        )
        place = order.view(6, 16)[window]
        found = buffer[0, :, place, :32].unflatten(-1, (2, 16)).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 16], ids=["even", "uneven"])
def test_mlp_tiles(rows: int) -> None:
    """Tiles of one class's tokens and tiles across classes and crops give the same bits."""
    inputs = make(replace(SMALL, crops=2, classes=3))
    buffer = torch.randn(2, 3, 24, 96, device=DEVICE).half()
    names = ("proj", "proj_bias", "fc1", "fc1_bias", "fc2", "fc2_bias")
    weights = tuple(inputs[name] for name in names)
    config = mlp.MLPConfig(rows, 16, num_warps=1, num_stages=1)
    out = mlp.launch(inputs["x"], buffer, weights, input_precision="ieee", config=config)
    one = mlp.launch(inputs["x"], buffer, weights, input_precision="ieee", config=replace(config, rows=64))
    torch.testing.assert_close(out, one, rtol=2e-3, atol=2e-3)
    state = torch.full((2, 7, 24, 32), 3.0, dtype=torch.float16, device=DEVICE)
    slot = state[:, 1:4]
    mlp.launch(inputs["x"], buffer, weights, input_precision="ieee", config=config, out=slot)
    assert torch.equal(slot, out)
    assert (state[:, :1] == 3).all()
    assert (state[:, 4:] == 3).all()


def test_writes_to_a_slice_of_a_state_or_in_place() -> None:
    inputs = make(replace(SMALL, crops=2))
    expected = op.window_block(**inputs)
    state = torch.full((2, 5, 24, 32), 7.0, dtype=torch.float16, device=DEVICE)
    slot = state[:, 2:4]
    assert op.window_block(**inputs, out=slot) is slot
    assert torch.equal(slot, expected)
    assert (state[:, :2] == 7).all()
    assert (state[:, 4:] == 7).all()
    x = inputs.pop("x")
    assert op.window_block(x, **inputs, out=x) is x
    assert torch.equal(x, expected)


def test_destination_offsets_are_64_bits_wide() -> None:
    """The system provides no memory for storage that is never touched."""
    inputs = make(Sizes(2, 2, 4, 4, channels=16, heads=1, window=2, hidden=16))
    far = torch.empty_strided((2, 2, 16, 16), (2**31 + 4096, 2**30 + 1024, 16, 1), dtype=torch.float16)
    out = far.to(DEVICE) if DEVICE.type == "cuda" else far
    op.window_block(**inputs, out=out)
    assert torch.equal(out, op.window_block(**inputs))


def test_operator_with_a_destination_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(SMALL, torch.float32)
    monkeypatch.undo()
    out = torch.zeros_like(inputs["x"])
    torch.library.opcheck(torch.ops.catseg_fast.window_block_into.default, (out, *inputs.values(), "ieee"))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(1, 3, 24, 32), r"out: has shape \[1, 3, 24, 32\]; expected \[1, 2, 24, 32\]"),
        (torch.zeros(1, 2, 24, 32).half(), "out: is torch.float16; expected torch.float32"),
        (
            torch.zeros(1, 2, 32, 24).transpose(2, 3),
            r"out: has strides \[1536, 768, 1, 24\]; expected \[any, any, 32, 1\]",
        ),
    ],
)
def test_refuses_bad_destinations(out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.window_block(**make(SMALL, torch.float32), out=out.to(DEVICE))


@pytest.mark.parametrize("name", ["x", "query_key", "qkv", "proj_bias", "fc1", "fc2_bias"])
def test_not_a_number_is_seen(name: str) -> None:
    """NaN is where torch has it (its attention on a CPU loses some), and in no other class."""
    inputs = make(SMALL)
    inputs[name].view(-1)[3] = torch.nan
    out, expected = op.window_block(**inputs).isnan(), plain.window_block(**inputs).isnan()
    assert expected.any()
    assert (out >= expected).all()
    if name == "x":  # of the first class
        assert torch.equal(out, expected)
        assert not out[:, 1].any()
