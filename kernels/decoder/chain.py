"""The decoder's layers in order, each on the kernel that is fastest for it.

| layer | compute capability 9.0 and higher | 8.0 | 8.6, 8.9 |
|---|---|---|---|
| phases of the aggregated cost volume | `boxes.py` | `patches.py` | `patches.py` |
| 3x3 convolutions of more than 32 channels | `boxes.py` | `patches.py` | `patches.py` |
| phases of normalised maps | `row_phases.py` | `row_phases.py` | `patches.py` |
| 3x3 convolutions of up to 32 channels | `rows.py` | `rows.py` | `rows.py` |
| the head | `patches.py` | `patches.py` | `patches.py` |

`patches.py` also computes everything that the others do not support: fp32, and sizes that cannot be divided
into their tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from catseg_fast.kernels.decoder import boxes, patches, row_phases, rows
from catseg_fast.kernels.decoder.group_norm import GroupNorm
from catseg_fast.kernels.decoder.layers import Layer
from catseg_fast.kernels.launch.capability import capability_of


def launch(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    group_norms: Sequence[GroupNorm],
    bias: Tensor,
    layers: Sequence[Layer],
    *,
    input_precision: str,
    out: Tensor | None = None,
    flag: Tensor | None = None,
) -> Tensor:
    """Return logits `[B, t, 4H, 4W]`; arguments are not checked.

    Args:
        x: `[B, t, HW, C]`, contiguous but for B and t.
        guidance: guidance of each stage, `[B or 1, 2H * 2W, out]`, contiguous but for B.
        weights: packed weight of each layer.
        group_norms: normalisation of each layer but the head.
        bias: bias of the head, `[1]`.
        layers: the sizes.
        input_precision: precision of products of fp32 numbers.
        out: tensor for the logits, of any floating type, contiguous but for B and t; by default a new one.
        flag: `[1]`, int32, set to 1 if a logit is infinite or NaN.
    """
    maps, norm = x.unflatten(2, (layers[0].height, layers[0].width)), None
    for index, (layer, group_norm) in enumerate(zip(layers, group_norms, strict=False)):
        addend = guidance[index // 2] if layer.scale == 2 else None
        maps, norm = convolve(maps, weights[index], addend, norm, group_norm, layer, input_precision)
    logits, _ = patches.KERNEL(
        maps, weights[-1], bias, norm, None, layers[-1],
        input_precision=input_precision, out=None if out is None else out[..., None], flag=flag,
    )  # fmt: skip
    found: Tensor = logits[..., 0]
    return found


def convolve(
    x: Tensor,
    weight: Tensor,
    guidance: Tensor | None,
    norm: Tensor | None,
    group_norm: GroupNorm,
    layer: Layer,
    input_precision: str,
) -> tuple[Tensor, Tensor]:
    """Return a layer's output with its border, and its scale and shift, by the layer's kernel."""
    capability = capability_of(x.device)
    upsamples = norm is not None and guidance is not None
    if upsamples and row_phases.unsupported(layer, x.dtype, capability) is None:
        return row_phases.KERNEL(x, weight, guidance, norm, group_norm, layer)
    if norm is not None and guidance is None and rows.unsupported(layer, x.dtype) is None:
        return rows.KERNEL(x, weight, norm, group_norm, layer)
    if boxes.unsupported(layer, x, weight, capability) is None:
        return boxes.KERNEL(x, weight, guidance, norm, group_norm, layer)
    return patches.KERNEL(x, weight, guidance, norm, group_norm, layer, input_precision=input_precision)
