"""Order of sums: in fp32, a kernel completes the sum of a product before it adds anything else, like torch.

The order in the compiled code cannot be seen in the interpreter. On an H200, `embed_cost_volume` at one
prompt had 2.3 times the error of torch, because its sum of 49 taps started at the bias.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from catseg_fast.kernels import OPS
from support import order

orders = functools.cache(order.orders)

FROM_THE_BIAS = """
  %cst = arith.constant dense<0.000000e+00> : tensor<32x64xf32> loc(#loc)
  %bias = tt.broadcast %loaded : tensor<1x64xf32> -> tensor<32x64xf32> loc(#loc)
  %y = tt.dot %a, %b, %cst : tensor<32x16xf32> * tensor<16x64xf32> -> tensor<32x64xf32> loc(#loc)
  %x = tt.dot %a, %b, %bias : tensor<32x16xf32> * tensor<16x64xf32> -> tensor<32x64xf32> loc(#loc)
  %z = tt.dot %a, %b, %x : tensor<32x16xf32> * tensor<16x64xf32> -> tensor<32x64xf32> loc(#loc)
"""


@pytest.mark.parametrize("op", OPS)
@pytest.mark.xdist_group("aot")  # the cache is of one process
def test_products_are_summed_up_first(op: str) -> None:
    by_name = orders()[op]
    assert by_name or op == "update_label_map"
    assert not {name: found for name, found in by_name.items() if found}


def test_a_sum_that_starts_at_the_bias_is_found() -> None:
    (found,) = order.products_that_start_elsewhere(FROM_THE_BIAS)
    assert found.startswith("%x = tt.dot")
    assert "%bias = tt.broadcast" in found


def test_why_it_matters() -> None:
    """A model of the GPU's sum, one fused multiply-add after another, at the failed check's sizes.

    PyTorch's own convolution is not the measure here: on CPUs without AVX-512 it starts at the bias, too.
    """
    torch.manual_seed(0)
    maps = torch.randn(25, 1, 24, 24) / 768**0.5  # a cost volume's scale
    weight, bias = (((torch.rand(*shape) * 2 - 1) / 7) for shape in ((32, 1, 7, 7), (32,)))
    truth = F.conv2d(maps.double(), weight.double(), bias.double(), padding=3).flatten(2).numpy()
    taps = F.unfold(maps, 7, padding=3).numpy()[:, :, None]  # 25, 49, 1, 576
    weights, biases = weight.view(32, 49, 1).numpy(), bias[:, None].numpy()

    def largest_error(first: np.ndarray, last: np.ndarray) -> float:
        x = np.broadcast_to(first, truth.shape)
        for tap in range(49):
            x = fma(taps[:, tap], weights[:, tap], x)
        return float(np.abs(x + last - truth).max())

    nothing = np.zeros_like(biases)
    assert 2 * largest_error(nothing, biases) < largest_error(biases, nothing)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A fused multiply-add in fp32: products of fp32 numbers are exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)
