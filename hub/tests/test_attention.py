"""Window and class attention of the packed kernel against plain PyTorch, on a GPU.

LOCAL_KERNELS=catseg-fast/catseg-ops=build pytest tests
"""

import pytest
import torch

import kernels

ops = kernels.get_kernel("catseg-fast/catseg-ops", version=1)


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("crops", "classes"), [(1, 1), (2, 7), (5, 51)])
def test_window_block(device, dtype, crops, classes):
    torch.manual_seed(0)
    C, M, HW = 128, 512, 576
    shapes = [(crops, HW, 2 * C), (3 * C, C), (C, C), (C,), (M, C), (M,), (C, M), (C,)]
    tensors = [torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3) for shape in shapes]
    inputs = [torch.randn(crops, classes, HW, C), *tensors]
    numbers = ((24, 24), 12, 6, 4)
    exact = ops.plain.window_block(*(x.double() for x in inputs), *numbers)
    inputs = [x.to(device, dtype) for x in inputs]
    plain = (ops.plain.window_block(*inputs, *numbers).double().cpu() - exact).abs().max()
    ours = (ops.window_block(*inputs, *numbers).double().cpu() - exact).abs().max()
    assert ours <= 2 * plain + 1e-5
