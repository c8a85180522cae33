"""Cost volume and 7x7 convolution of many prompts in the Fourier domain.

The cost volume is linear in the image features, and its convolution is a product of spectra. Given the
spectra of image and kernel, a class takes one matrix product, one product over prompts per frequency, and an
inverse transform of the C channels, instead of 49 taps over P prompts. Padding maps by 3 suffices: only the
padding wraps around.

The transforms of each class are products with real matrices. Unlike FFTs, they support 16-bit types, and at
27x27 they are faster. The scale is split about evenly between the two transforms, so that spectra fit in
fp16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from catseg_fast.engine.folding import Plan, wide

REACH = 3  # half of the 7x7 kernel

# With fewer prompts, the transforms cost more than they save; with fewer classes of all crops, the spectra
# do. Measured on CPUs in fp32. By the number of operations, 18 prompts would suffice; GPUs were not measured.
LEAST_PROMPTS = 48
LEAST_CROP_CLASSES = 32


@dataclass(frozen=True)
class Spectra:
    """Spectra at the f frequencies of real maps, and the inverse transform.

    A dimension of 2f holds each frequency's real part, then its imaginary part.
    """

    features: Tensor  # [2f, B, F]
    kernel: Tensor  # [2f, P, C]
    inverse: tuple[Tensor, ...]  # for both dimensions, [HW, 2f]; or for the columns, then for the rows


def pays_off(plan: Plan, crop_classes: int) -> bool:
    """Check whether the Fourier form is faster."""
    if torch.compiler.is_exporting():
        return False  # runtimes of exported graphs have no complex numbers
    weight = plan.embed
    if weight.dtype.itemsize == 2 and weight.device.type == "cpu":
        return False  # about as fast in bf16, on CPUs that have it; fp16 is emulated
    return is_less_work(plan.prompts, crop_classes)


def is_less_work(prompts: int, crop_classes: int) -> bool:
    """Check whether the Fourier form saves more than it costs."""
    return prompts >= LEAST_PROMPTS and crop_classes >= LEAST_CROP_CLASSES


def make_spectra(plan: Plan, features: Tensor, resolution: tuple[int, int]) -> Spectra:
    """Return spectra of unit image features `[B, HW, F]` and of the kernel, computed in fp32 at least."""
    (H, W), dtype, device = resolution, plan.embed.dtype, features.device
    height, width = size = (H + REACH, W + REACH)
    columns = width // 2 + 1  # the others are conjugates of these
    unit = 2.0 ** round(math.log2(height * width) / 2)  # exact in every type, like the first frequency

    spectrum = torch.fft.rfft2(wide(features).unflatten(1, resolution), s=size, dim=(1, 2)).flatten(1, 2)
    spectrum = torch.view_as_real(spectrum * (unit / (height * width))).permute(1, 3, 0, 2).flatten(0, 1)

    reach = range(REACH, -REACH - 1, -1)  # the kernel is reversed
    taps = torch.kron(_waves(height, height, reach, device), _waves(width, columns, reach, device))
    weight = wide(plan.embed).permute(2, 3, 1, 0).flatten(0, 1)  # 49, P, C
    kernel = torch.einsum("kd,dpc->kpc", _real(taps).to(weight.dtype), weight)

    rows = _waves(height, height, range(H), device)
    column = torch.arange(columns, device=device)[:, None]
    both = (2 - (2 * column % width == 0).double()) / unit  # a column and its conjugate
    across = _waves(width, columns, range(W), device) * both
    if dtype.itemsize == 2:  # one product rounds less, two take a sixth of the operations
        inverse: tuple[Tensor, ...] = (_real(torch.kron(rows, across)).T,)
    else:
        inverse = (_real(torch.stack([across, 1j * across])).mT.flatten(0, 1), _real(rows).T)
    inverse[-1][:, 1] = 1  # for the bias: the first frequency has no imaginary part
    return Spectra(
        spectrum.to(dtype).contiguous(),  # an FFT leaves any order
        kernel.to(dtype),
        tuple(matrix.to(dtype) for matrix in inverse),
    )


def embed_cost_volume(plan: Plan, spectra: Spectra, crops: slice, text: Tensor) -> Tensor:
    """Run `torch_stages.embed_cost_volume` for some crops, `[b, t, HW, C]`, for `text [b or 1, t, P, F]`."""
    features, (t, P) = spectra.features[:, crops], text.shape[1:3]
    n = features.shape[1] * t
    cost_volume = torch.einsum("kbf,bnf->kbn", features, text.flatten(1, 2))  # 2f, b, t*P
    cost_volume = cost_volume.reshape(-1, 2, n, P)
    real, imaginary = spectra.kernel.unflatten(0, (-1, 2)).unbind(1)  # f, P, C
    product = (cost_volume.flatten(1, 2) @ real).unflatten(1, (2, n))  # f, 2, n, C
    product[:, 0].baddbmm_(cost_volume[:, 1], imaginary, alpha=-1)
    product[:, 1].baddbmm_(cost_volume[:, 0], imaginary)
    return _invert(spectra.inverse, product, plan.embed_bias).unflatten(0, (-1, t))


def _invert(inverse: tuple[Tensor, ...], spectrum: Tensor, bias: Tensor) -> Tensor:
    """Return the maps `[n, HW, C]` of a spectrum `[f, 2, n, C]`, plus the bias `[C]`."""
    n, C = spectrum.shape[2:]
    *columns, last = inverse
    if not columns:
        spectrum = spectrum.flatten(0, 1)
        spectrum[1] = bias
        return last.expand(n, -1, -1) @ spectrum.transpose(0, 1)
    frequencies = last.shape[1]
    spectrum = columns[0] @ spectrum.view(frequencies // 2, -1, n * C)
    spectrum = spectrum.view(frequencies, -1, n, C)  # W columns
    spectrum[1] = bias
    return (last @ spectrum.flatten(1)).view(-1, n, C).transpose(0, 1).contiguous()


def _waves(size: int, frequencies: int, places: range, device: torch.device) -> Tensor:
    """Return the discrete Fourier transform `[frequencies, places]` of `size` points in double precision."""
    frequency = torch.arange(frequencies, device=device, dtype=torch.float64)
    place = torch.arange(places.start, places.stop, places.step, device=device, dtype=torch.float64)
    angle = torch.outer(frequency, place).remainder(size) * (-2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle)


def _real(waves: Tensor) -> Tensor:
    """Interleave rows of real and imaginary parts: complex `[..., f, n]` to `[..., 2f, n]`."""
    return torch.view_as_real(waves).movedim(-1, -2).flatten(-3, -2)
