"""Guided upsampling decoder (CAT-Seg paper, section 3.4) in nine kernels.

For x `[B, t, HW, C]` and each of two stages, with GN group normalisation and g an image's guidance map, the
same for every class:

    u = phases(x) + g        y = conv3x3(relu(GN(u)))        x' = relu(GN(y))

and logits = head(x'), a 3x3 convolution to one channel. Each of the five convolutions (`layers.py`,
`chain.py`) reads its input through the normalisation before it and leaves the statistics of its output, which
`group_norm.py` merges. Only u and y are in memory, channels last, with a border of one pixel, `[B, t, 2H + 2,
2W + 2, out]`. The upsampled maps `[B*t, up, 2H, 2W]`, their concatenation with the guidance
`[B*t, up + G, 2H, 2W]`, the normalised maps and patches are never materialised.

Each call allocates the maps and writes their borders, so that no state is kept between calls: kept buffers
would save a hundredth of the decoder's time, and would stay allocated.

The op computes in x's type, independently of autocast. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels.decoder import chain, plain
from catseg_fast.kernels.decoder.group_norm import GroupNorm
from catseg_fast.kernels.decoder.layers import HEAD_GROUP, Layer, layers, pack, unpack
from catseg_fast.kernels.launch.checks import check_like, check_runnable
from catseg_fast.kernels.launch.op import Form, Op, Random, Sizes


def decode(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
    input_precision: str = "ieee",
    out: Tensor | None = None,
    flag: Tensor | None = None,
) -> Tensor:
    """Upsample a chunk to logits with Triton kernels, for any sizes.

    Args:
        x: `[B, t, HW, C]`, of at least one class; fp16, bf16 or fp32.
        guidance: for each stage, the part of its first convolution that is the same for every class, channels
            last: `[B or 1, 2H * 2W, out]`, then `[B or 1, 4H * 4W, out]`.
        weights: packed weights (`pack_weights`): for each stage, the phases, the weight and bias `[out]` of
            the first normalisation, the 3x3 convolution, and the weight and bias `[out]` of the second
            normalisation; then the head and its bias `[1]`.
        groups: numbers of groups of each stage's two normalisations.
        eps: eps of each stage's two normalisations.
        resolution: (H, W).
        input_precision: precision of products of fp32 numbers: "ieee", "tf32x3" or "tf32".
        out: tensor for the logits, `[B, t, 4H, 4W]` of any floating type, contiguous but for B and t, such as
            a slice of a larger tensor. By default a new tensor.
        flag: `[1]`, int32: set to 1 if a logit is infinite or NaN as it is written, else left unchanged.

    Returns:
        Logits `[B, t, 4H, 4W]`: `out`, or a new tensor of x's type.

    Raises:
        ValueError: if an argument has a wrong shape, type or device.
        RuntimeError: if the GPU is too old.
    """
    _check(x, guidance, weights, groups, eps, resolution, input_precision)
    _check_destination(x, len(guidance), resolution, out, flag)
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        x = x.contiguous()
    guidance, weights = ([tensor.contiguous() for tensor in tensors] for tensors in (guidance, weights))
    arguments = (x, guidance, weights, groups, eps, resolution, input_precision)
    if out is None and flag is None:
        return OP.call(_decode, *arguments)
    if out is None:
        factor = 2 ** len(guidance)
        out = x.new_empty((*x.shape[:2], *(factor * size for size in resolution)))
    OP.call(_decode_into, *arguments, out=out, flag=flag)
    return out


def pack_weights(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return `decode`'s weights from those of `plain.decode`, whose convolutions have their taps first."""
    *stages, head, bias = weights
    packed = []
    for index, weight in enumerate(stages):
        packed.append(pack(weight, scale=2 if index % 6 == 0 else 1) if index % 3 == 0 else weight)
    return [*packed, pack(head, 1, HEAD_GROUP), bias]


def _plain(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
) -> Tensor:
    """Run `plain.decode` with packed weights."""
    weights, found = list(weights), _layers(x, guidance, resolution)
    for index, layer in zip((*range(0, len(weights) - 2, 3), -2), found, strict=True):
        weights[index] = unpack(weights[index], layer)
    return plain.decode(x, guidance, weights, groups, eps, resolution)


def _layers(x: Tensor, guidance: Sequence[Tensor], resolution: Sequence[int]) -> list[Layer]:
    height, width = resolution
    return layers(height, width, x.shape[3], [maps.shape[2] for maps in guidance])


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


@torch.library.custom_op("catseg_fast::decode_into", mutates_args=("out", "flag"))
def _decode_into(
    out: Tensor,
    flag: Tensor | None,
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
    input_precision: str,
) -> None:
    OP.launch(x, guidance, weights, groups, eps, resolution, input_precision, out=out, flag=flag)


@_decode_into.register_fake
def _(*_: Any) -> None:
    return None


def _launch(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    resolution: Sequence[int],
    input_precision: str,
    *,
    out: Tensor | None = None,
    flag: Tensor | None = None,
) -> Tensor:
    affine = zip(weights[1:-2:3], weights[2:-2:3], groups, eps, strict=True)
    return chain.launch(
        x, guidance, [*weights[:-2:3], weights[-2]], [GroupNorm(*norm) for norm in affine], weights[-1],
        _layers(x, guidance, resolution), input_precision=input_precision, out=out, flag=flag,
    )  # fmt: skip


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
            f"x: has shape {list(x.shape)}; expected [B, t, {height * width}, C], not empty, "
            f"for a resolution of {height}x{width}"
        )
    check_runnable("x", x, input_precision)
    stages = len(guidance)
    counts = {"weights": (weights, 6 * stages + 2), "groups": (groups, 2 * stages), "eps": (eps, 2 * stages)}
    for name, (given, expected) in counts.items():
        if len(given) != expected:
            raise ValueError(f"{name}: has {len(given)} items; expected {expected} for {stages} stages")
    for stage, maps in enumerate(guidance):
        height, width = 2 * height, 2 * width
        check_like(f"guidance[{stage}]", maps, ((1, x.shape[0]), height * width, maps.shape[-1]), x)
    *convolutions, head = _layers(x, guidance, resolution)
    for index, layer in enumerate(convolutions):
        for offset, shape in enumerate((layer.packed, (layer.channels_out,), (layer.channels_out,))):
            check_like(f"weights[{3 * index + offset}]", weights[3 * index + offset], shape, x)
    check_like(f"weights[{6 * stages}]", weights[-2], head.packed, x)
    check_like(f"weights[{6 * stages + 1}]", weights[-1], (1,), x)


def _check_destination(
    x: Tensor, stages: int, resolution: Sequence[int], out: Tensor | None, flag: Tensor | None
) -> None:
    if out is not None:
        height, width = (2**stages * size for size in resolution)
        shape = [*x.shape[:2], height, width]
        if list(out.shape) != shape or not out.is_floating_point() or out.device != x.device:
            raise ValueError(
                f"out: is {out.dtype} {list(out.shape)} on {out.device}; expected a floating type, {shape} "
                f"and {x.device}"
            )
        if out.stride(3) != 1 or out.stride(2) != width:
            raise ValueError(
                f"out: has strides {list(out.stride())}; expected [any, any, {width}, 1], for rows that "
                "follow each other"
            )
    if flag is not None and (flag.shape != (1,) or flag.dtype != torch.int32 or flag.device != x.device):
        raise ValueError(
            f"flag: is {flag.dtype} {list(flag.shape)} on {flag.device}; expected torch.int32 [1] "
            f"on {x.device}"
        )


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
        "weights": pack_weights(weights),
        "groups": [out // sizes.group for out in sizes.decoder for _ in range(2)],
        "eps": [1e-5] * (2 * len(sizes.decoder)),
        "resolution": sizes.resolution,
    }


OP = Op(
    name="decode",
    plain=_plain,
    triton=decode,
    forms=(Form(_launch),),
    make_inputs=_make_inputs,
    make_options=lambda arguments: {"flag": arguments["x"].new_zeros(1, dtype=torch.int32)},
    sizes={"": Sizes()},
    odd=(
        Sizes(1, 2, 1, 2, channels=16, decoder=(16, 16), guided=False),
        Sizes(2, 3, 5, 4, channels=9, decoder=(6, 12), group=3),
        Sizes(1, 7, 4, 4, channels=128, decoder=(64, 32), guided=False),
        Sizes(2, 2, 3, 5, channels=24, decoder=(32, 8), group=8),
    ),
    mma=dict.fromkeys(("boxes_kernel", "patches_kernel", "row_phases_kernel", "rows_kernel"), "wgmma"),
)
