"""Guided upsampling decoder (CAT-Seg paper, section 3.4) in nine kernels.

For x `[B, t, HW, C]` and each of two stages, with GN group normalisation and g an image's guidance map, the
same for every class:

    u = phases(x) + g        y = conv3x3(relu(GN(u)))        x' = relu(GN(y))

and logits = head(x'), a 3x3 convolution to one channel. The five convolutions are `convolution.py`'s kernel,
each of which reads its input through the normalisation before it and leaves the statistics of its output;
`group_norm.py` merges them. Only u and y are in memory, `[B*t, 2H, 2W, out]` channels last; never
materialised are the upsampled maps `[B*t, up, 2H, 2W]`, their concatenation with the guidance
`[B*t, up + G, 2H, 2W]`, the normalised maps, and patches.

The op computes in x's type whatever autocast says, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels import convolution
from catseg_fast.kernels.convolution import ConvolutionConfig, Size
from catseg_fast.kernels.decoder import group_norm, plain
from catseg_fast.kernels.launch.checks import check_like, check_runnable
from catseg_fast.kernels.launch.kernel import Kernel
from catseg_fast.kernels.launch.op import Form, Op, Random, Sizes


def decode(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
    input_precision: str = "ieee",
) -> Tensor:
    """Upsample a chunk to logits on Triton kernels, any sizes.

    Args:
        x: `[B, t, HW, C]`, of at least one class; fp16, bf16 or fp32.
        guidance: of each stage, the part of its first convolution that is the same for every class, channels
            last: `[B or 1, 2H * 2W, out]`, then `[B or 1, 4H * 4W, out]`.
        weights: taps first; of each stage, `[4 * out, 2, 2, in]` (output row and column phase first), scale
            and shift `[out]` of the first normalisation, `[out, 3, 3, out]`, and the second's `[out]`; then
            the head's `[1, 3, 3, out]` and `[1]`.
        groups: of each stage's two normalisations.
        eps: likewise.
        resolution: (H, W).
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Returns:
        Logits `[B, t, 4H, 4W]`.

    Raises:
        ValueError: if an argument has a wrong shape, type or device.
        RuntimeError: if the GPU is too old.
    """
    _check(x, guidance, weights, groups, eps, resolution, input_precision)
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        x = x.contiguous()
    guidance, weights = ([tensor.contiguous() for tensor in tensors] for tensors in (guidance, weights))
    return OP.call(_decode, x, guidance, weights, groups, eps, resolution, input_precision)


@torch.library.custom_op("catseg_fast::decode", mutates_args=())
def _decode(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
    input_precision: str,
) -> Tensor:
    logits: Tensor = OP.launch(x, guidance, weights, groups, eps, resolution, input_precision)
    return logits


@_decode.register_fake
def _(x: Tensor, guidance: Sequence[Tensor], *rest: Any) -> Tensor:
    (height, width), factor = rest[3], 2 ** len(guidance)
    return x.new_empty((*x.shape[:2], factor * height, factor * width))


def _convolve(
    x: Tensor,
    weight: Tensor,
    size: Size,
    *,
    addend: Tensor | None,
    norm: Tensor | None,
    affine: tuple[Tensor, Tensor, int, float] | None,
    input_precision: str,
    config: ConvolutionConfig,
) -> tuple[Tensor, Tensor | None]:
    """A convolution, whose tiles are the parts of its statistics, and what these come to.

    Args:
        affine: weight, bias, groups and eps of the normalisation behind it; None where there is none.

    Returns:
        The output, and scale and shift of its normalisation or None.
    """
    out, statistics = convolution.launch(
        x, weight, size, addend=addend, norm=norm, statistics=affine is not None,
        input_precision=input_precision, config=config,
    )  # fmt: skip
    if affine is None or statistics is None:
        return out, None
    return out, group_norm.launch(statistics, *affine, size, config.pixels)


CONVOLUTION = Kernel(
    _convolve,
    partial(convolution.problem, "decode"),
    convolution.default_config,
    convolution.candidates,
    convolution.interpreter_config,
)


def _launch(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
    input_precision: str,
) -> Tensor:
    (B, t, _, channels), (height, width) = x.shape, resolution
    norm: Tensor | None = None
    convolve = partial(CONVOLUTION, input_precision=input_precision)
    for stage, maps in enumerate(guidance):
        phases, scale1, shift1, conv, scale2, shift2 = weights[6 * stage : 6 * stage + 6]
        out = maps.shape[-1]
        first = (scale1, shift1, groups[2 * stage], eps[2 * stage])
        second = (scale2, shift2, groups[2 * stage + 1], eps[2 * stage + 1])
        size = Size(height, width, channels, out, taps=2, scale=2)
        x, norm = convolve(x, phases, size, addend=maps, norm=norm, affine=first)
        height, width, channels = 2 * height, 2 * width, out
        size = Size(height, width, channels, channels, taps=3)
        x, norm = convolve(x, conv, size, addend=None, norm=norm, affine=second)
    head, bias = weights[-2:]
    size = Size(height, width, channels, 1, taps=3)
    logits, _ = convolve(x, head, size, addend=bias, norm=norm, affine=None)
    return logits.view(B, t, height, width)


def _check(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
    input_precision: str,
) -> None:
    height, width = resolution
    if x.ndim != 4 or x.shape[2] != height * width or not x.numel():
        raise ValueError(
            f"x: has shape {list(x.shape)}; expected [B, t, {height * width}, C] with none of them 0, "
            f"for a resolution of {height}x{width}"
        )
    check_runnable("x", x, input_precision)
    stages, channels = len(guidance), x.shape[3]
    counts = {"weights": (weights, 6 * stages + 2), "groups": (groups, 2 * stages), "eps": (eps, 2 * stages)}
    for name, (given, expected) in counts.items():
        if len(given) != expected:
            raise ValueError(f"{name}: has {len(given)} items; expected {expected} for {stages} stages")
    for stage, maps in enumerate(guidance):
        out = maps.shape[-1]
        height, width = 2 * height, 2 * width
        check_like(f"guidance[{stage}]", maps, ((1, x.shape[0]), height * width, out), x)
        shapes = ((4 * out, 2, 2, channels), (out,), (out,), (out, 3, 3, out), (out,), (out,))
        for index, shape in enumerate(shapes, 6 * stage):
            check_like(f"weights[{index}]", weights[index], shape, x)
        channels = out
    check_like(f"weights[{6 * stages}]", weights[-2], (1, 3, 3, channels), x)
    check_like(f"weights[{6 * stages + 1}]", weights[-1], (1,), x)


def _make_inputs(sizes: Sizes, random: Random) -> dict[str, Any]:
    B, _, positions, channels = sizes.state
    guidance, weights = [], []
    for out in sizes.decoder:
        positions *= 4
        guidance.append(random.normal(B if sizes.guided else 1, positions, out))
        weights += [random.weight(4 * out, 2, 2, channels), random.normal(out), random.bias(out)]
        weights += [random.weight(out, 3, 3, out), random.normal(out), random.bias(out)]
        channels = out
    weights += [random.weight(1, 3, 3, channels), random.bias(1)]
    return {
        "x": random.normal(*sizes.state),
        "guidance": guidance,
        "weights": weights,
        "groups": [out // sizes.group for out in sizes.decoder for _ in range(2)],
        "eps": [1e-5] * (2 * len(sizes.decoder)),
        "resolution": sizes.resolution,
    }


OP = Op(
    name="decode",
    plain=plain.decode,
    triton=decode,
    forms=(Form(_launch),),
    make_inputs=_make_inputs,
    sizes={"": Sizes()},
    odd=(
        Sizes(1, 2, 1, 2, channels=16, decoder=(16, 16), guided=False),
        Sizes(2, 3, 5, 4, channels=9, decoder=(6, 12), group=3),
        Sizes(1, 7, 4, 4, channels=128, decoder=(64, 32), guided=False),
        Sizes(2, 2, 3, 5, channels=24, decoder=(32, 8), group=8),
    ),
    mma={"convolution_kernel": "wgmma"},
)
