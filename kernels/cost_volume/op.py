"""Cost volume and its 7x7 convolution (CAT-Seg paper, section 3.2).

For unit image features `[B, HW, F]` and unit text features `[B or 1, t, P, F]`, of B crops, t classes and P
prompts:

    cost[b, t, i, p] = image[b, i] . text[b, t, p]        x = conv7x7(cost) + bias, from P channels to C

With one prompt per class, one kernel does both (`single_prompt.py`). With several prompts, the first kernel
(`cost.py`) writes the cost volume of the chunk channels last, `[B, t, HW, P]`, and the second
(`convolution.py`) convolves it. The cost volume of all classes, its permuted copies and the patches
`[B*t, 49 P, HW]` are never materialised.

The op computes in the features' type, independently of autocast. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catseg_fast.kernels.cost_volume import convolution, cost, plain, single_prompt
from catseg_fast.kernels.cost_volume.convolution import Size
from catseg_fast.kernels.launch.checks import check_like, check_runnable, fits_32_bits
from catseg_fast.kernels.launch.op import Form, Op, Random, Sizes


def embed_cost_volume(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor,
    resolution: Sequence[int],
    input_precision: str = "ieee",
) -> Tensor:
    """Compute the cost volume and its convolution with Triton kernels, for any sizes.

    Args:
        image: unit image features `[B, HW, F]`; fp16, bf16 or fp32.
        text: unit text features `[B or 1, t, P, F]`, of at least one class.
        weight: weight of the convolution, taps first: `[C, 7, 7, P]`.
        bias: `[C]`.
        resolution: (H, W).
        input_precision: precision of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Returns:
        `[B, t, HW, C]`.

    Raises:
        ValueError: if an argument has a wrong shape, type or device.
        RuntimeError: if the GPU is too old.
    """
    height, width = resolution
    if image.ndim != 3 or image.shape[1] != height * width or not image.numel():
        raise ValueError(
            f"image: has shape {list(image.shape)}; expected [B, {height * width}, F], not empty, "
            f"for a resolution of {height}x{width}"
        )
    check_runnable("image", image, input_precision)
    if text.ndim != 4 or not text.numel():
        raise ValueError(f"text: has shape {list(text.shape)}; expected [B or 1, t, P, F], not empty")
    check_like("weight", weight, (len(weight), 7, 7, weight.shape[-1]), image)
    check_like("bias", bias, (len(weight),), image)
    check_like("text", text, ((1, len(image)), text.shape[1], weight.shape[-1], image.shape[2]), image)
    image = image if fits_32_bits(image, 1, 2) else image.contiguous()
    text = text if text.stride(3) == 1 and fits_32_bits(text, 2, 3) else text.contiguous()
    return OP.call(_embed_cost_volume, image, text, weight.contiguous(), bias, resolution, input_precision)


@torch.library.custom_op("catseg_fast::embed_cost_volume", mutates_args=())
def _embed_cost_volume(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor, resolution: Sequence[int], input_precision: str
) -> Tensor:
    out: Tensor = OP.launch(image, text, weight, bias, resolution, input_precision)
    return out


@_embed_cost_volume.register_fake
def _(image: Tensor, text: Tensor, weight: Tensor, *_: object) -> Tensor:
    return image.new_empty((len(image), text.shape[1], image.shape[1], len(weight)))


def _launch(
    image: Tensor, text: Tensor, weight: Tensor, bias: Tensor, resolution: Sequence[int], input_precision: str
) -> Tensor:
    out: Tensor
    height, width = resolution
    size = Size(height, width, text.shape[2], len(weight), taps=7)
    if size.channels_in == 1:
        out = single_prompt.KERNEL(image, text, weight, bias, size, input_precision=input_precision)
        return out
    maps = cost.KERNEL(image, text, input_precision=input_precision)
    out = convolution.KERNEL(maps, weight, bias, size, input_precision=input_precision)
    return out


def _make_inputs(sizes: Sizes, random: Random) -> dict[str, Any]:
    B, t, HW, C = sizes.state
    return {
        "image": random.unit(B, HW, sizes.features).mT.contiguous().mT,  # laid out as CLIP's are
        "text": random.unit(B if sizes.guided else 1, t, sizes.prompts, sizes.features),
        "weight": random.weight(C, 7, 7, sizes.prompts),
        "bias": random.bias(C),
        "resolution": sizes.resolution,
    }


OP = Op(
    name="embed_cost_volume",
    plain=plain.embed_cost_volume,
    triton=embed_cost_volume,
    forms=(Form(_launch),),
    make_inputs=_make_inputs,
    sizes={"P=1": Sizes(guided=False), "P=80": Sizes(prompts=80, guided=False)},
    odd=(
        Sizes(2, 3, 5, 8, channels=40, features=70),
        Sizes(1, 33, 6, 6, channels=16, features=32, guided=False),
        Sizes(1, 2, 9, 31, channels=128, features=64, guided=False),
        Sizes(2, 2, 5, 8, channels=24, features=50, prompts=5),
        Sizes(1, 2, 3, 2, channels=7, features=9, prompts=3),
    ),
    mma={"single_prompt_kernel": "wgmma", "cost_kernel": "wgmma", "convolution_kernel": "wgmma"},
)
