"""The training loss, computed together with its gradient.

It is the mean binary cross-entropy of logits resized to the labels' size, like
`catseg_fast.reference.segmentation_loss`: `mean softplus(x) - sum of x at each pixel's own class / all`.
Plain torch keeps the resized logits and the targets, `[B, T, H, W]` each, until the backward pass. Here, each
chunk of classes is resized, and its gradient `sigmoid(x) - target` is resized back at once. The memory that
is kept has the size of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from catseg_fast.config import IGNORE_LABEL
from catseg_fast.labels import class_indices

# Values of a resized chunk: enough for a GPU, few enough for a CPU's cache.
CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**27}
LINEAR = 40.0  # above it softplus(x) is x in double precision


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_label: int = IGNORE_LABEL) -> Tensor:
    """Return the mean binary cross-entropy over pixels and classes, in fp32 at least; differentiable once.

    A pixel with the ignore label counts as belonging to no class.

    Args:
        logits: `[B, T, h, w]`, resized to the labels' size.
        labels: class indices `[B, H, W]` of any integer type, on any device.
        ignore_label: label of pixels without a class.

    Raises:
        InputTypeError: if the labels are not integers.
        InputError: if a label is neither a class index nor the ignore label.
    """
    labels = class_indices(labels, logits.shape[1], ignore_label)
    loss: Tensor = _Loss.apply(logits, labels.to(logits.device, non_blocking=True), ignore_label)
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_label: int) -> Tensor:
        (B, T), size = logits.shape[:2], labels.shape[-2:]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        count = B * T * size[0] * size[1]
        step = max(1, CHUNK_VALUES.get(logits.device.type, 2**20) * T // count)
        # Ignored pixels get a class that is in no chunk.
        own = torch.where(labels == ignore_label, -1, labels)[:, None]
        total = torch.zeros((), dtype=dtype, device=logits.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits, dtype=dtype) if wanted else None
        for start in range(0, T, step):
            part = logits[:, start : start + step].to(dtype)
            with torch.enable_grad():
                part = part.detach().requires_grad_(wanted)
                resized = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
            x, places = resized.detach(), own - start
            inside = ((places >= 0) & (places < part.shape[1])).to(dtype)
            places = places.clamp(0, part.shape[1] - 1)
            total += F.softplus(x, threshold=LINEAR).sum() - (x.gather(1, places) * inside).sum()
            if gradient is not None:
                slope = x.sigmoid().scatter_add_(1, places, -inside).div_(count)
                (gradient[:, start : start + step],) = torch.autograd.grad(resized, part, slope)
        ctx.gradient, ctx.dtype = gradient, logits.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.gradient * slope).to(ctx.dtype), None, None
