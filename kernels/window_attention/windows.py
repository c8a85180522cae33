"""Shifted windows as index arithmetic, for the kernels of a window-attention block.

Window order concatenates the windows of the cyclically shifted image, row by row, like `plain.window_order`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Windows(NamedTuple):
    """Shifted windows of a feature map; all sizes are in positions."""

    height: int
    width: int
    window: int
    shift: int

    def constants(self) -> dict[str, int]:
        """The kernels' arguments."""
        return {"H": self.height, "W": self.width, "WINDOW": self.window, "SHIFT": self.shift}


@triton.jit
def window_position(
    j, down, across, H: tl.constexpr, W: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr
):
    """Return the image position y * W + x of token `j` of the window in row `down` and column `across`."""
    y = down * WINDOW + j // WINDOW + SHIFT
    x = across * WINDOW + j % WINDOW + SHIFT
    y = tl.where(y >= H, y - H, y)
    x = tl.where(x >= W, x - W, x)
    return y * W + x


@triton.jit
def window_region(
    j, down, across, H: tl.constexpr, W: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr
):
    """Return which of four regions token `j` of a window belongs to; regions are not adjacent in the image.

    Only the last windows of a row or column hold patches from opposite borders.
    """
    below = (down == H // WINDOW - 1) & (j // WINDOW >= WINDOW - SHIFT)
    right = (across == W // WINDOW - 1) & (j % WINDOW >= WINDOW - SHIFT)
    return below.to(tl.int32) * 2 + right.to(tl.int32)
