"""Cost volume and 7x7 convolution of many prompts in the Fourier domain.

The cost volume is linear in the image features, and its convolution is a product of spectra. With the spectra
of image and kernel at hand, a class costs one matrix product, one product over prompts a frequency, and an
inverse transform of the C channels, in place of 49 taps over P prompts. Maps padded by 3 suffice: what wraps
around falls on the padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.plan import Plan

PADDING = 3  # half of the 7x7 kernel

# Below this many prompts the transforms cost more than they save; below this many classes of all crops, the
# kernel's spectrum does.
LEAST_PROMPTS = 16
LEAST_CROP_CLASSES = 32


@dataclass(frozen=True)
class Spectra:
    """Spectra at the f frequencies of a real map of `size`."""

    size: tuple[int, int]
    features: Tensor  # [B, 2f, F]: real, then imaginary parts
    kernel: Tensor  # [f, P, C], complex


def pays_off(plan: Plan, crop_classes: int) -> bool:
    """Whether the Fourier form is the faster one; transforms exist in single and double precision alone."""
    precise = plan.embed.dtype in (torch.float32, torch.float64)
    return precise and plan.prompts >= LEAST_PROMPTS and crop_classes >= LEAST_CROP_CLASSES


def make_spectra(plan: Plan, features: Tensor, resolution: tuple[int, int]) -> Spectra:
    """Spectra of unit image features `[B, HW, F]` and of the kernel."""
    height, width = size = (resolution[0] + PADDING, resolution[1] + PADDING)
    maps = features.unflatten(1, resolution)
    spectrum = torch.fft.rfft2(maps, s=size, dim=(1, 2)).flatten(1, 2)  # B, f, F
    # The kernel's centre goes to the origin, its upper and left half around to the other end.
    kernel = F.pad(plan.embed, (0, width - plan.embed.shape[3], 0, height - plan.embed.shape[2]))
    kernel = kernel.roll((-PADDING, -PADDING), dims=(2, 3))
    kernel = torch.fft.rfft2(kernel).conj().flatten(2).permute(2, 1, 0)
    return Spectra(size, torch.cat([spectrum.real, spectrum.imag], dim=1), kernel.resolve_conj().contiguous())


def embed_cost_volume(
    plan: Plan, spectra: Spectra, crops: slice, text: Tensor, resolution: tuple[int, int]
) -> Tensor:
    """`catseg_fast.stages.embed_cost_volume` of some crops: `[b, t, HW, C]` for `text [b or 1, t, P, F]`."""
    (H, W), (t, P) = resolution, text.shape[1:3]
    features = spectra.features[crops]
    parts = features @ text.flatten(1, 2).transpose(1, 2)  # b, 2f, t*P
    cost_volume = torch.complex(*parts.unflatten(2, (t, P)).chunk(2, dim=1))  # b, f, t, P
    product = cost_volume @ spectra.kernel  # b, f, t, C
    height, width = spectra.size
    product = product.unflatten(1, (height, width // 2 + 1))
    x = torch.fft.irfft2(product, s=spectra.size, dim=(1, 2))[:, :H, :W]
    return x.permute(0, 3, 1, 2, 4).reshape(len(features), t, H * W, plan.channels) + plan.embed_bias
