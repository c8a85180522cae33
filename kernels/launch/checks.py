"""Checks of arguments that every op makes before a launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
PRECISIONS = ("ieee", "tf32x3", "tf32")
OLDEST = (8, 0)
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
INTERPRETED = triton.knobs.runtime.interpret  # read once, like Triton when it decorates kernels


def too_old(gpu: torch.device) -> str | None:
    """Return why a GPU is too old for the kernels; None if it is not."""
    capability = torch.cuda.get_device_capability(gpu)
    if capability >= OLDEST:
        return None
    seen, needed = (".".join(map(str, version)) for version in (capability, OLDEST))
    return (
        f"{torch.cuda.get_device_name(gpu)} has compute capability {seen}; the Triton kernels need {needed}"
    )


def check_runnable(name: str, x: Tensor, input_precision: str) -> None:
    """Check that the kernels run on the device of `x`, and support its type.

    Raises:
        ValueError: if they do not; the message says why.
        RuntimeError: if the GPU is too old.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if input_precision not in PRECISIONS:
        raise ValueError(f"input_precision: {input_precision!r} is not one of {', '.join(PRECISIONS)}")
    if x.device.type == "cuda":
        if reason := too_old(x.device):
            raise RuntimeError(f"{name}: {reason}")
    elif x.device.type != "cpu" or not INTERPRETED:
        raise ValueError(f"{name}: is on {x.device}; the Triton kernels need a CUDA tensor")


def check_like(name: str, tensor: Tensor, shape: Sequence[int | tuple[int, ...]], x: Tensor) -> None:
    """Check a tensor's shape, and that its type and device are those of `x`.

    Args:
        shape: the expected size of each dimension, or the sizes that are accepted.

    Raises:
        ValueError: if they differ; the message has the actual and the expected ones.
    """
    sizes = [tuple(dict.fromkeys(size)) if isinstance(size, tuple) else (size,) for size in shape]
    if tensor.ndim != len(sizes) or any(
        seen not in size for seen, size in zip(tensor.shape, sizes, strict=True)
    ):
        expected = ", ".join(" or ".join(map(str, size)) for size in sizes)
        raise ValueError(f"{name}: has shape {list(tensor.shape)}; expected [{expected}]")
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name}: is {tensor.dtype}; expected {x.dtype}, like the others")
    if tensor.device != x.device:
        raise ValueError(f"{name}: is on {tensor.device}; expected {x.device}, like the others")


def fits_32_bits(x: Tensor, *dimensions: int) -> bool:
    """Check whether offsets along some dimensions can be computed in 32 bits, as the kernels do."""
    return sum((x.shape[i] - 1) * x.stride(i) for i in dimensions) < 2**31


def check_destination(name: str, out: Tensor, x: Tensor) -> None:
    """Check that the state `[B, t, HW, C]` of `x` can be written to `out`.

    Raises:
        ValueError: if its shape, type or device is not that of `x`, or its positions are not dense.
    """
    check_like(name, out, x.shape, x)
    if out.stride()[2:] != (x.shape[3], 1):
        raise ValueError(
            f"{name}: has strides {list(out.stride())}; expected [any, any, {x.shape[3]}, 1], dense positions"
        )
