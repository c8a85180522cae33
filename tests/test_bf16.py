"""Kernels in bf16, without a GPU: the interpreter is corrected (`support/bf16.py`), then ops are compared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.kernels import OPS, load
from catseg_fast.kernels.launch.capability import CAPABILITIES, assume
from catseg_fast.kernels.launch.op import Random, Sizes
from support import bf16
from support.accuracy import assert_matches_its_plain_form

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def corrected() -> Iterator[None]:
    with bf16.as_on_gpu():
        yield


@triton.jit
def unary_kernel(x_ptr, wide_ptr, sum_ptr, exp_ptr, relu_ptr, triple_ptr, half_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(wide_ptr + i, x.to(tl.float32))
    tl.store(sum_ptr, tl.sum(x.to(tl.float32), 0))
    tl.store(exp_ptr + i, tl.exp(x.to(tl.float32)))
    tl.store(relu_ptr + i, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(triple_ptr + i, x * 2.0 + x)
    tl.store(half_ptr + i, x.to(tl.float16))


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    o = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + o), tl.load(b_ptr + o), tl.load(c_ptr + o))
    tl.store(out_ptr + o, c)


@triton.jit
def round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


def special(dtype: torch.dtype) -> Tensor:
    """Numbers of all sizes, between two bf16 numbers and in the middle, zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(480, generator=generator) * torch.logspace(-38, 38, 480)
    middle = (torch.arange(0x3F80, 0x3F88, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    above = ((torch.arange(0x3F80, 0x3F88, dtype=torch.int32) << 16) + 0x8001).view(torch.float32)
    carry = torch.tensor([0x3FFFFFFF, 0x7F7FFFFF, 0x0000FFFF], dtype=torch.int32).view(torch.float32)
    rest = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat((x, middle, above, carry, rest))
    return torch.nn.functional.pad(x, (0, 512 - len(x))).to(dtype).to(DEVICE)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_conversions_round_to_the_nearest_number() -> None:
    x = special(torch.float32)
    out = torch.empty(512, dtype=BF16, device=DEVICE)
    round_kernel[(1,)](x, out, 512)
    assert_same(out, x.to(BF16))


def test_operations_are_those_of_torch() -> None:
    x = special(BF16)
    wide, total = torch.empty(512, device=DEVICE), torch.empty(1, device=DEVICE)
    exp, relu, triple, half = (
        torch.empty(512, dtype=dtype, device=DEVICE) for dtype in (BF16, BF16, BF16, torch.float16)
    )
    unary_kernel[(1,)](x, wide, total, exp, relu, triple, half, 512)
    assert_same(wide, x.float())
    assert total.isnan().all()
    assert_same(half, x.half())
    assert_same(relu, x.relu())
    assert_same(triple, x * 2 + x)
    torch.testing.assert_close(exp, x.float().exp().to(BF16), rtol=2**-7, atol=1e-37, equal_nan=True)
    finite = torch.where(x.float().abs() < 1e3, x, 0)
    unary_kernel[(1,)](finite, wide, total, exp, relu, triple, half, 512)
    torch.testing.assert_close(total[0], finite.float().sum())


def test_products_are_summed_in_fp32() -> None:
    a, b = (torch.randn(64, 64, device=DEVICE).to(BF16) for _ in range(2))
    c = torch.randn(64, 64, device=DEVICE)
    out = torch.empty(64, 64, device=DEVICE)
    product_kernel[(1,)](a, b, c, out, 64)
    torch.testing.assert_close(out, a.float() @ b.float() + c, rtol=1e-6, atol=1e-5)


def check(name: str, sizes: Sizes) -> None:
    op = load(name)
    assert_matches_its_plain_form(op, op.make_inputs(sizes, Random(BF16, DEVICE)))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [pytest.param(name, sizes, id=f"{name}-{i}") for name in OPS for i, sizes in enumerate(load(name).odd)],
)
def test_ops_match_their_plain_form(name: str, sizes: Sizes) -> None:
    check(name, sizes)


PUBLISHED = {  # widths, with fewer positions
    "window_block": Sizes(1, 3, 5, 10, window=5, shift=2),
    "class_collect": Sizes(1, 33, 2, 2),
    "class_apply": Sizes(1, 65, 1, 3),
    "decode": Sizes(1, 1, 8, 8),
    "embed_cost_volume": Sizes(1, 3, 5, 8, features=128),
}


@pytest.mark.parametrize(
    "capability", [pytest.param(x, marks=() if x == 90 else pytest.mark.slow) for x in CAPABILITIES]
)
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.usefixtures("default_configs")
def test_default_configs(name: str, capability: int) -> None:
    with assume(capability):
        check(name, PUBLISHED[name])
