"""Sizes of resized pictures, as detectron2 computes them."""

from __future__ import annotations


def shortest_edge_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Return the (height, width) of detectron2's `ResizeShortestEdge.get_output_shape`.

    The shorter side becomes `shortest`; if the longer one is then above `longest`, both shrink. The order of
    the roundings matters: a size computed in one step can differ by a pixel. No side is below 1.

    Args:
        height, width: size of the picture.
        shortest: length of the shorter side, in pixels.
        longest: largest length of the longer side.
    """
    scale = shortest / min(height, width)
    new_height, new_width = (shortest, scale * width) if height < width else (scale * height, shortest)
    if max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))
