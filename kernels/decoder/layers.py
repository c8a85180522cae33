"""The decoder's convolutions: their sizes, their packed weights, and the maps between them.

A layer of scale S = 2 computes the four phases of an upsampled map, with 2x2 taps each; a layer of scale S =
1 is a 3x3 convolution. Pixel (S r + a, S s + b) of the output, of phase (a, b), is

    y[S r + a, S s + b] = addend + sum_ij W[a, b, :, :, i, j] . f(x[r + i + a - 1, s + j + b - 1])

over the K x K taps, with f the identity or relu(scale x + shift). Outside the map, f(x) is zero.

A map that is read through f has a border of one pixel, `[N, H + 2, W + 2, C]`, so that kernels need no masks
at its edges: a channel's border holds the infinity that scale x + shift turns into minus infinity, and ReLU
into zero (`group_norm.py` writes it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_GROUP = (4, 6)


@dataclass(frozen=True)
class Layer:
    """Sizes of a convolution of the decoder.

    Attributes:
        height: height of the input.
        width: width of the input.
        channels_in: channels of the input.
        channels_out: channels of the output.
        scale: S.
        normalised: f is a normalisation and ReLU, and the input has a border.
        group: rows and columns of the output pixels of one phase that form a row of the matrix product. Only
            groups of the head's few channels fill a tile; other layers have groups of one pixel.
    """

    height: int
    width: int
    channels_in: int
    channels_out: int
    scale: int
    normalised: bool
    group: tuple[int, int] = (1, 1)

    @property
    def pixels(self) -> int:
        """Pixels of an input map."""
        return self.height * self.width

    @property
    def phases(self) -> int:
        """Output pixels per input pixel."""
        return self.scale**2

    @property
    def taps(self) -> int:
        """Taps along each axis, K."""
        return 2 if self.scale == 2 else 3

    @property
    def packed(self) -> tuple[int, int, int]:
        """Shape of the packed weight."""
        return self.phases, self.patch[0] * self.patch[1] * self.block_in, self.block_out

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and columns of input pixels that a group of output pixels depends on."""
        return self.group[0] + self.taps - 1, self.group[1] + self.taps - 1

    @property
    def block_in(self) -> int:
        """Input channels of a packed weight, padded with zeros to a power of two."""
        return block(self.channels_in)

    @property
    def block_out(self) -> int:
        """Columns of a packed weight: the outputs of a group, padded likewise."""
        return block(self.group[0] * self.group[1] * self.channels_out)

    def sizes(self) -> dict[str, int]:
        """Return the sizes by name, as they are in measured configs."""
        return {
            "height": self.height,
            "width": self.width,
            "channels_in": self.channels_in,
            "channels_out": self.channels_out,
            "scale": self.scale,
            "normalised": int(self.normalised),
            "group": self.group[0] * self.group[1],
        }

    def constants(self) -> dict[str, int]:
        """Return the sizes as the kernels' constants."""
        return {
            "H": self.height,
            "W": self.width,
            "CI": self.channels_in,
            "CO": self.channels_out,
        }


def layers(height: int, width: int, channels: int, stages: Sequence[int]) -> list[Layer]:
    """Return the convolutions: two per stage, with the given output channels, and the head."""
    found = []
    for index, out in enumerate(stages):
        found.append(Layer(height, width, channels, out, scale=2, normalised=index > 0))
        height, width, channels = 2 * height, 2 * width, out
        found.append(Layer(height, width, channels, channels, scale=1, normalised=True))
    return [*found, Layer(height, width, channels, 1, scale=1, normalised=True, group=HEAD_GROUP)]


def block(size: int) -> int:
    """Return the smallest power of two, at least 16 and `size`, as a matrix product requires."""
    return max(16, 1 << (size - 1).bit_length())


def divisor(size: int, limit: int) -> int:
    """Return the largest power of two that divides `size` and is at most `limit`, a power of two."""
    return min(size & -size, limit)


def pack(weight: Tensor, scale: int, group: tuple[int, int] = (1, 1)) -> Tensor:
    """Return a layer's weight as the right operand of its matrix product.

    Args:
        weight: weight with its taps first, `[S*S * out, K, K, in]`; outputs are by phase, then by channel.
        scale: S.
        group: rows and columns of output pixels in a row of the product.

    Returns:
        `[S*S, patch pixels * block_in, block_out]`, contiguous: the tap between each input pixel of a patch
        and each output pixel of a group, or zero (a Toeplitz matrix).
    """
    layer = Layer(1, 1, weight.shape[3], len(weight) // scale**2, scale, False, group)
    (rows, columns), (group_rows, group_columns), K = layer.patch, group, layer.taps
    CI, CO = layer.channels_in, layer.channels_out
    taps = weight.unflatten(0, (layer.phases, CO)).permute(0, 2, 3, 4, 1)
    packed = weight.new_zeros(layer.phases, rows, columns, layer.block_in, group_rows, group_columns, CO)
    for y in range(group_rows):
        for x in range(group_columns):
            packed[:, y : y + K, x : x + K, :CI, y, x] = taps
    packed = packed.flatten(4).flatten(1, 3)
    return F.pad(packed, (0, layer.block_out - packed.shape[2])).contiguous()


def unpack(packed: Tensor, layer: Layer) -> Tensor:
    """Return a view of the packed weight with its taps first."""
    taps = packed.unflatten(1, (*layer.patch, layer.block_in))
    taps = taps[:, : layer.taps, : layer.taps, : layer.channels_in, : layer.channels_out]
    return taps.permute(0, 4, 1, 2, 3).flatten(0, 1)


def new_map(x: Tensor, layer: Layer) -> Tensor:
    """Allocate the output of a layer on `x [B, t, ...]` with a border, `[B, t, S*H + 2, S*W + 2, out]`."""
    height, width = layer.scale * layer.height + 2, layer.scale * layer.width + 2
    return x.new_empty((*x.shape[:2], height, width, layer.channels_out))


def new_statistics(x: Tensor, layer: Layer, parts: int) -> Tensor:
    """Allocate the statistics of a layer's output, `[B, t, parts, 2, out]` (`group_norm.py`)."""
    return x.new_empty((*x.shape[:2], parts, 2, layer.channels_out), dtype=torch.float32)


def stride_b(guidance: Tensor | None) -> int:
    """Return the stride of `guidance [B or 1, ...]` over crops; 0 if all crops share it, or there is none."""
    return 0 if guidance is None or len(guidance) == 1 else guidance.stride(0)
