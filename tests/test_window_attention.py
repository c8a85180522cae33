"""The Triton window-attention block against its plain torch counterpart, `stages.window_block`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.folding import WindowBlock
from catseg_fast.engine.terms import BlockGuidance, block_guidance
from catseg_fast.engine.triton_stages import window_block
from catseg_fast.kernels.launch.capability import CAPABILITIES, assume
from catseg_fast.kernels.window_attention import mlp
from catseg_fast.kernels.window_attention.windows import window_position, window_region
from support.accuracy import assert_classes_are_apart, assert_no_worse_than_eager, upcast

DTYPES = (torch.float32, torch.float16)  # the interpreter computes bf16 incorrectly
G = 48  # channels of the guidance

pytestmark = pytest.mark.usefixtures("on_gpu")


def make_block(
    dtype: torch.dtype, C: int = 128, heads: int = 4, window: int = 12, shift: int = 0, M: int = 512
) -> WindowBlock:
    """Return random weights of a trained model's scale, with sharper attention."""

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)

    def bias(size: int) -> Tensor:
        return (torch.randn(size) * 0.3).to(dtype)

    qkv = weight(3 * C, C)
    qkv[:C] *= 2 * (C // heads) ** -0.5
    return WindowBlock(
        heads, window, shift, qkv, weight(2 * C, G), bias(2 * C), weight(C, C), bias(C),
        weight(M, C), bias(M), weight(C, M), bias(C),
    )  # fmt: skip


def make_inputs(
    block: WindowBlock, B: int, t: int, resolution: tuple[int, int] = (24, 24), crops: int | None = 1
) -> tuple[BlockGuidance, Tensor]:
    """Return guidance of one or of B crops, or only a bias, and a chunk."""
    HW, dtype = resolution[0] * resolution[1], block.qkv.dtype
    tokens = None if crops is None else torch.randn(crops, HW, G).to(dtype)
    guidance = block_guidance(block, tokens, resolution, torch.get_default_device())
    return guidance, torch.randn(B, t, HW, block.qkv.shape[1]).to(dtype)


def check(block: WindowBlock, guidance: BlockGuidance, x: Tensor) -> None:
    truth = stages.window_block(upcast(block), upcast(guidance), upcast(x))
    eager = stages.window_block(block, guidance, x)
    assert_no_worse_than_eager(window_block(block, guidance, x), eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 6])
@pytest.mark.parametrize(("B", "t", "crops"), [(1, 1, 1), (2, 3, 2), (2, 2, 1), (1, 7, None)])
def test_matches_plain_torch(B: int, t: int, crops: int | None, shift: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = make_block(dtype, shift=shift)
    check(block, *make_inputs(block, B, t, crops=crops))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch_over_many_classes(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    block = make_block(dtype)
    check(block, *make_inputs(block, 1, 33, (12, 12)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    heads=st.sampled_from([1, 2, 3, 4]),
    sixteenths=st.integers(1, 4),
    M=st.integers(1, 100),
    window=st.integers(3, 9),
    windows=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    shift=st.integers(0, 8),
    B=st.integers(1, 2),
    seed=st.integers(0, 9),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_matches_plain_torch_at_any_size(
    heads: int,
    sixteenths: int,
    M: int,
    window: int,
    windows: tuple[int, int],
    shift: int,
    B: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    block = make_block(dtype, 16 * sixteenths * heads, heads, window, shift % window, M)
    check(block, *make_inputs(block, B, 3, (window * windows[0], window * windows[1]), crops=B))


@pytest.mark.usefixtures("default_configs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_default_configs_match_plain_torch(capability: int, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    block = make_block(dtype, 64, 2, 6, 3, 96)
    with assume(capability):
        check(block, *make_inputs(block, 1, 10, (6, 12)))


@pytest.mark.parametrize(
    ("C", "heads", "window", "resolution"),
    [
        (256, 4, 12, (24, 24)),
        (144, 6, 7, (14, 21)),
        (64, 1, 24, (24, 24)),
        (32, 2, 16, (32, 16)),
        (32, 1, 2, (8, 6)),
        (16, 1, 1, (6, 8)),
    ],
)
def test_matches_plain_torch_at_sizes_of_other_models(
    C: int, heads: int, window: int, resolution: tuple[int, int]
) -> None:
    torch.manual_seed(2)
    block = make_block(torch.float16, C, heads, window, window // 2, 4 * C)
    check(block, *make_inputs(block, 1, 2, resolution))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_finite(dtype: torch.dtype) -> None:
    """Upstream subtracts 100: scores that differ by more are not masked."""
    torch.manual_seed(3)
    block = make_block(dtype, 32, 1, 4, 2, 32)
    guidance, x = make_inputs(block, 1, 2, (8, 8))
    guidance = replace(guidance, query_key=guidance.query_key * 10)
    assert any(mask is not None for mask in guidance.masks)
    lower = replace(guidance, masks=tuple(mask if mask is None else 100 * mask for mask in guidance.masks))
    seen = stages.window_block(upcast(block), upcast(guidance), upcast(x))
    unseen = stages.window_block(upcast(block), upcast(lower), upcast(x))
    assert (seen - unseen).abs().max() > 0.1
    check(block, guidance, x)


@triton.jit
def _order_kernel(
    position_ptr, region_ptr, H: tl.constexpr, W: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    HW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    j = i % (WINDOW * WINDOW)
    down = i // (WINDOW * WINDOW) // (W // WINDOW)
    across = i // (WINDOW * WINDOW) % (W // WINDOW)
    tl.store(position_ptr + i, window_position(j, down, across, H, W, WINDOW, SHIFT), mask=i < HW)
    tl.store(region_ptr + i, window_region(j, down, across, H, W, WINDOW, SHIFT), mask=i < HW)


@pytest.mark.parametrize(
    ("resolution", "window", "shift"),
    [
        ((24, 24), 12, 0),
        ((24, 24), 12, 6),
        ((24, 36), 12, 5),
        ((21, 14), 7, 3),
        ((8, 16), 8, 0),
        ((12, 8), 4, 1),
    ],
)
def test_order_and_regions_are_those_of_the_plain_block(
    resolution: tuple[int, int], window: int, shift: int
) -> None:
    (H, W), N = resolution, window**2
    block = make_block(torch.float32, 16, 1, window, shift, 16)
    guidance = block_guidance(block, None, resolution, torch.get_default_device())
    position, region = torch.full((2, H * W), -1, dtype=torch.int32)
    size = triton.next_power_of_2(H * W)
    _order_kernel[(1,)](position, region, H=H, W=W, WINDOW=window, SHIFT=shift, HW=H * W, BLOCK=size)
    assert position.tolist() == guidance.order.tolist()
    region = region.view(-1, N)
    different = region[:, :, None] != region[:, None, :]
    for found, mask in zip(different, guidance.masks, strict=True):
        assert torch.equal(found, torch.zeros(N, N, dtype=torch.bool) if mask is None else mask != 0)


@triton.jit
def _gelu_kernel(x_ptr, exact_ptr, fitted_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(exact_ptr + i, mlp.gelu(x, True))
    tl.store(fitted_ptr + i, mlp.gelu(x, False))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_gelu() -> None:
    x = torch.cat([torch.linspace(-20, 20, 2**14 - 4), torch.tensor([1e4, -1e4, 6e4, -6e4])])
    exact, fitted = torch.empty_like(x), torch.empty_like(x)
    _gelu_kernel[(1,)](x, exact, fitted, BLOCK=len(x))
    truth = torch.nn.functional.gelu(x.double())
    torch.testing.assert_close(exact.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fitted.double(), truth, rtol=1e-6, atol=2.6e-5)


@pytest.mark.parametrize("layout", ["crops apart", "classes apart", "every other channel", "channels first"])
def test_takes_strided_chunks(layout: str) -> None:
    torch.manual_seed(4)
    block = make_block(torch.float16, 48, 1, 4, 2, 64)
    guidance, x = make_inputs(block, 2, 3, (8, 8), crops=2)
    if layout == "crops apart":
        strided = torch.full((2, 7, *x.shape[2:]), float("nan"), dtype=x.dtype)[:, 2:5].copy_(x)
    elif layout == "classes apart":
        strided = torch.full((2, 6, *x.shape[2:]), float("nan"), dtype=x.dtype)[:, ::2].copy_(x)
    elif layout == "every other channel":
        strided = torch.full((*x.shape[:3], 96), float("nan"), dtype=x.dtype)[..., ::2].copy_(x)
    else:
        strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    out = window_block(block, guidance, strided)
    assert out.is_contiguous()
    assert torch.equal(out, window_block(block, guidance, x))


@pytest.mark.usefixtures("overflow_checks")
def test_offsets_are_64_bits_wide() -> None:
    """The system provides no memory for storage that is never touched."""
    torch.manual_seed(5)
    block = make_block(torch.float16, 16, 1, 2, 1, 16)
    guidance, x = make_inputs(block, 2, 2, (4, 4))
    far = torch.empty_strided(x.shape, (2**31 + 4096, 2**30 + 1024, 16, 1), dtype=x.dtype).copy_(x)
    assert torch.equal(window_block(block, guidance, far), window_block(block, guidance, x))


def test_is_deterministic_and_classes_do_not_meet() -> None:
    torch.manual_seed(6)
    block = make_block(torch.float16, 48, 3, 6, 3, 96)
    guidance, x = make_inputs(block, 1, 3, (12, 12))
    assert_classes_are_apart(lambda x: window_block(block, guidance, x), x)


def test_order_of_classes_does_not_matter() -> None:
    """Except for rounding, which can depend on the place in a tile."""
    torch.manual_seed(6)
    block = make_block(torch.float16, 48, 3, 6, 3, 96)
    guidance, x = make_inputs(block, 1, 5, (12, 12))
    truth = stages.window_block(upcast(block), upcast(guidance), upcast(x))
    order = torch.randperm(5)
    ours, eager = window_block(block, guidance, x[:, order]), stages.window_block(block, guidance, x)
    assert_no_worse_than_eager(ours, eager[:, order], truth[:, order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 64, 16)}, r"x: has shape \[1, 64, 16\]; expected \[B, t, 64, C\]"),
        ({"x": torch.zeros(1, 0, 64, 16)}, r"x: has shape \[1, 0, 64, 16\]"),
        ({"x": torch.zeros(1, 1, 63, 16)}, r"x: has shape \[1, 1, 63, 16\]; expected \[B, t, 64, C\]"),
        ({"x": torch.zeros(1, 1, 64, 32)}, r"qkv: has shape \[48, 16\]; expected \[96, 32\]"),
        ({"x": torch.zeros(1, 1, 64, 16).double()}, "x: dtype torch.float64 is not one of"),
        (
            {"x": torch.zeros(1, 1, 64, 16).half()},
            "qkv: is torch.float32; expected torch.float16",
        ),
        ({"window": 3}, "window: 3 does not divide the resolution 8x8"),
        ({"window": 25}, "x, heads, window: a window of 25; expected at most 24"),
        ({"shift": 4}, r"shift: 4 is not in \[0, 4\)"),
        (
            {"heads": 3},
            "x, heads, window: 16 channels in 3 heads; expected a multiple of 16 up to 256, and of the heads",
        ),
        ({"x": torch.zeros(1, 1, 64, 24)}, "24 channels in 1 heads"),
        ({"qkv": torch.zeros(48, 32)}, r"qkv: has shape \[48, 32\]; expected \[48, 16\]"),
        ({"fc2": torch.zeros(16, 31)}, r"fc2: has shape \[16, 31\]; expected \[16, 32\]"),
        (
            {"query_key": torch.zeros(2, 64, 32)},
            r"query_key: has shape \[2, 64, 32\]; expected \[1, 1 or 64, 32\]",
        ),
        ({"input_precision": "fp8"}, "input_precision: 'fp8' is not one of ieee"),
    ],
)
def test_refuses_bad_input(change: dict[str, Any], message: str) -> None:
    block = make_block(torch.float32, 16, 1, 4, 2, 32)
    guidance, x = make_inputs(block, 1, 1, (8, 8))
    precision = change.pop("input_precision", "ieee")
    x = change.pop("x", x)
    of_guidance = {name: change.pop(name) for name in ("query_key", "window", "shift") if name in change}
    with pytest.raises(ValueError, match=message):
        window_block(replace(block, **change), replace(guidance, **of_guidance), x, None, precision)
