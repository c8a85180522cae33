"""The kernels of class attention: numbers of classes, tiles, means, descriptors, destinations, NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast.kernels.class_attention import apply, collect, op, plain
from catseg_fast.kernels.launch.capability import CAPABILITIES
from catseg_fast.kernels.launch.launcher import record
from catseg_fast.kernels.launch.op import Random, Sizes
from support.accuracy import assert_no_worse_than_eager, upcast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16)  # the interpreter computes bf16 incorrectly
SMALL = Sizes(2, 7, 2, 3, channels=32, heads=2, hidden=48)


def collect_inputs(sizes: Sizes, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    return op.COLLECT.make_inputs(sizes, Random(dtype, DEVICE))


def apply_inputs(sizes: Sizes, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    return op.APPLY.make_inputs(sizes, Random(dtype, DEVICE))


def check(function: Any, plain_function: Any, inputs: dict[str, Any]) -> None:
    truth = plain_function(**{name: upcast(value) for name, value in inputs.items()})
    results = (function(**inputs), plain_function(**inputs), truth)
    for tensors in zip(*(x if isinstance(x, tuple) else (x,) for x in results), strict=True):
        assert_no_worse_than_eager(*tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 33, 64, 65, 97])
def test_any_number_of_classes(classes: int, dtype: torch.dtype) -> None:
    sizes = Sizes(2, classes, 1, 3, channels=32, heads=2, hidden=48, guided=classes % 2 == 0)
    check(op.class_collect, plain.class_collect, collect_inputs(sizes, dtype))
    check(op.class_collect, plain.class_collect, collect_inputs(replace(sizes, streamed=True), dtype))
    check(op.class_apply, plain.class_apply, apply_inputs(sizes, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.usefixtures("default_configs")
def test_default_configs(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the published widths, and fewer positions."""
    monkeypatch.setattr("catseg_fast.kernels.launch.capability._assumed.capability", capability)
    sizes = Sizes(1, 35, 1, 3, hidden=96)
    check(op.class_collect, plain.class_collect, collect_inputs(sizes, dtype))
    with record() as launches:
        check(op.class_apply, plain.class_apply, apply_inputs(sizes, dtype))
    assert launches[0].constants["TMA"] == (capability >= 90 and dtype == torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", [(1, 1), (2, 2)])
def test_whole_tiles_and_others_agree(pooling: tuple[int, int], dtype: torch.dtype) -> None:
    """If rows divide the classes, there is no loop over a tile's positions."""
    inputs = apply_inputs(replace(SMALL, classes=32, height=4, width=4, pooling=pooling), dtype)
    tiles = [apply.ApplyConfig(rows, 16, num_warps=1, num_stages=1) for rows in (16, 32, 64)]
    found = []
    for config in tiles:
        with record() as launches:
            found.append(apply.launch(*inputs.values(), input_precision="ieee", config=config))
        assert launches[0].constants["WHOLE"] == (config.rows <= 32)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hidden", [48, 40], ids=["even", "uneven"])
def test_descriptors_and_pointers_give_the_same_bits(hidden: int) -> None:
    inputs = apply_inputs(replace(SMALL, hidden=hidden))
    config = apply.ApplyConfig(16, 16, num_warps=1, num_stages=1, tma=True)
    with record() as launches:
        described = apply.launch(*inputs.values(), input_precision="ieee", config=config)
        pointed = apply.launch(*inputs.values(), input_precision="ieee", config=replace(config, tma=False))
    assert [launch.constants["TMA"] for launch in launches] == [True, False]
    assert torch.equal(described, pointed)


@pytest.mark.parametrize("change", [{"hidden": 44}, {"channels": 48, "heads": 4}], ids=str)
def test_what_no_descriptor_takes_goes_by_pointers(change: dict[str, int]) -> None:
    """Rows that are not multiples of 16 bytes; heads whose block would reach into the next."""
    inputs = apply_inputs(replace(SMALL, **change))
    config = apply.ApplyConfig(16, 16, num_warps=1, num_stages=1, tma=True)
    with record() as launches:
        out = apply.launch(*inputs.values(), input_precision="ieee", config=config)
    assert not launches[0].constants["TMA"]
    torch.testing.assert_close(out, plain.class_apply(**inputs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_are_those_of_the_sums(dtype: torch.dtype) -> None:
    inputs = collect_inputs(replace(SMALL, streamed=True), dtype)
    key_value, key_sum = op.class_collect(**inputs)
    inputs["means"] = True
    means, same = op.class_collect(**inputs)
    assert means.dtype == dtype
    assert torch.equal(same, key_sum)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    expected = plain.mean_values(key_value, key_sum, inputs["length"], dtype)
    torch.testing.assert_close(means, expected, rtol=tolerance, atol=tolerance)


def test_keys_that_are_all_zero_weigh_nothing() -> None:
    """The mean without keys is 0, as in torch."""
    inputs = collect_inputs(SMALL)
    inputs["bias"][:32] = -60.0  # phi of it is below the smallest number of fp16
    for function in (op.class_collect, plain.class_collect):
        means, _ = function(**inputs)
        assert not means.isnan().any()


@pytest.mark.parametrize("channels", [16, 32, 256])
def test_collect_by_groups_of_heads(channels: int) -> None:
    inputs = collect_inputs(replace(SMALL, channels=96, heads=3, streamed=True), torch.float32)
    config = collect.CollectConfig(channels, 16, num_warps=1, num_stages=1)
    with record() as launches:
        found = collect.launch(*inputs.values(), input_precision="ieee", config=config)
    assert launches[0].constants["GROUP"] == (3 if channels == 256 else 1)
    for ours, expected in zip(found, plain.class_collect(**inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", [(1, 1), (2, 2)])
def test_writes_to_a_slice_of_a_state_or_in_place(pooling: tuple[int, int]) -> None:
    inputs = apply_inputs(replace(SMALL, height=4, width=4, pooling=pooling))
    expected = op.class_apply(**inputs)
    state = torch.full((2, 9, 16, 32), 7.0, dtype=torch.float16, device=DEVICE)
    slot = state[:, 1:8]
    assert op.class_apply(**inputs, out=slot) is slot
    assert torch.equal(slot, expected)
    assert (state[:, :1] == 7).all()
    assert (state[:, 8:] == 7).all()
    x = inputs.pop("x")
    assert op.class_apply(x, **inputs, out=x) is x
    assert torch.equal(x, expected)


def test_destination_offsets_are_64_bits_wide() -> None:
    """The system provides no memory for storage that is never touched."""
    inputs = apply_inputs(Sizes(2, 2, 2, 2, channels=16, heads=1, hidden=16))
    far = torch.empty_strided((2, 2, 4, 16), (2**31 + 4096, 2**30 + 1024, 16, 1), dtype=torch.float16)
    out = far.to(DEVICE) if DEVICE.type == "cuda" else far
    op.class_apply(**inputs, out=out)
    assert torch.equal(out, op.class_apply(**inputs))


def test_operator_with_a_destination_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = apply_inputs(SMALL, torch.float32)
    monkeypatch.undo()
    out = torch.zeros_like(inputs["x"])
    torch.library.opcheck(torch.ops.catseg_fast.class_apply_into.default, (out, *inputs.values(), "ieee"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(2, 7, 6, 16)}, r"out: has shape \[2, 7, 6, 16\]; expected \[2, 7, 6, 32\]"),
        ({"out": torch.zeros(2, 7, 32, 6).transpose(2, 3)}, "out: has strides"),
        ({"means": torch.zeros(2, 6, 2, 16, 8)}, r"means: has shape \[2, 6, 2, 16, 8\]; expected"),
        ({"means": torch.zeros(2, 6, 2, 16, 16).half()}, "means: is torch.float16; expected torch.float32"),
        ({"means": torch.zeros(2, 6, 2, 16, 16).transpose(3, 4)}, "means: has strides"),
        ({"key_sum": torch.zeros(2, 16)}, r"key_sum: has shape \[2, 16\]; expected \[2, 6, 2, 16\]"),
    ],
)
def test_refuses_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    inputs = apply_inputs(SMALL, torch.float32) | {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        op.class_apply(**inputs)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "text_key"])
@pytest.mark.parametrize("means", [True, False])
def test_collect_shows_what_is_not_a_number(means: bool, name: str) -> None:
    inputs = collect_inputs(SMALL) | {"means": means}
    inputs[name].view(-1)[3] = torch.nan
    found, expected = op.class_collect(**inputs), plain.class_collect(**inputs)
    assert found[0].isnan().any()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["x", "text_query", "means", "key_sum", "q", "fc1", "fc1_bias", "fc2_bias"])
def test_apply_shows_what_is_not_a_number(name: str) -> None:
    """NaN is where torch has it, and possibly at neighbouring positions of the same tile."""
    inputs = apply_inputs(SMALL)
    inputs[name].view(-1)[3] = torch.nan
    out, expected = op.class_apply(**inputs).isnan(), plain.class_apply(**inputs).isnan()
    assert expected.any()
    assert (out >= expected).all()
    assert torch.equal(out.any(), expected.any())
    if name in ("x", "means", "key_sum"):  # of the first crop
        assert not out[1].any()
