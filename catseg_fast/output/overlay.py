"""Pictures of a segmentation: coloured overlay with a legend, and the label map as a 16-bit PNG."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from catseg_fast.errors import InputError
from catseg_fast.output.colours import Colours, colours_for
from catseg_fast.output.strips import row_strips

_PAPER, _INK, _FAINT = (250, 250, 250), (35, 35, 40), (120, 120, 128)
_OUTLINE = (190, 190, 196)
_SMALLEST_SIDE = 360  # with a legend, smaller pictures are enlarged by a whole number
_SMALLEST_FONT = 13
_LONGEST_NAME = 12  # in ems


def class_shares(labels: Tensor, count: int) -> Tensor:
    """The share of the pixels of `labels` [H, W] that each of `count` classes has: float64 `[count]`.

    Raises:
        InputError: if a label is not in 0..count-1.
    """
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= count:
        raise InputError(f"labels: expected values in 0..{count - 1} for {count} classes, got {low}..{high}")
    pixels = torch.zeros(count, dtype=torch.int64, device=labels.device)
    for rows in row_strips(*labels.shape):
        pixels += torch.bincount(labels[rows].flatten(), minlength=count)
    return pixels.double() / labels.numel()


def overlay(
    image: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    alpha: float = 0.55,
    legend: bool = True,
    max_legend: int = 16,
    colours: Colours | None = None,
) -> Image.Image:
    """Blend the classes' colours over an image and list the classes present beside it.

    Args:
        image: `[3, H, W]`, RGB in 0..255.
        labels: integers `[H, W]`, indices into `classes`.
        classes: class names.
        alpha: share of the colours, 0 (the image alone) to 1 (the colours alone).
        legend: whether to add the panel; small pictures are then enlarged to go with its text.
        max_legend: classes in the legend, those with the largest areas; the rest is summed up.
        colours: of the classes, uint8 `[T, 3]`; by default those that `colours_for` chooses for this picture.

    Raises:
        InputError: if the shapes disagree, a label has no class, or `alpha` is not in 0..1.
    """
    if image.ndim != 3 or image.shape[0] != 3 or labels.shape != image.shape[1:]:
        raise InputError(
            f"labels: expected [H, W] of an image [3, H, W], got labels {list(labels.shape)} "
            f"and image {list(image.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: expected a number in 0..1, got {alpha}")
    if colours is not None and colours.shape != (len(classes), 3):
        raise InputError(
            f"colours: expected [T, 3] for {len(classes)} classes, got shape {list(colours.shape)}"
        )
    shares = class_shares(labels, len(classes))
    factor = max(1, round(_SMALLEST_SIDE / max(labels.shape))) if legend else 1
    pixels = image if image.dtype == torch.uint8 else image.round().byte()
    photo = _to_numpy(pixels.permute(1, 2, 0), factor)
    label_map = _to_numpy(labels, factor)
    if colours is None:
        colours = colours_for(classes, label_map, photo, alpha)
    height, width = label_map.shape
    if legend:
        canvas = _with_legend((width, height), shares, classes, colours, max_legend)
    else:
        canvas = Image.new("RGB", (width, height))
    for rows in row_strips(height, width):  # nothing of the picture's size is made beside the canvas
        paint = colours[label_map[rows]]
        paint[_contours(label_map, rows)] = 255
        part = Image.fromarray(np.ascontiguousarray(photo[rows]))
        canvas.paste(Image.blend(part, Image.fromarray(paint), alpha), (0, rows.start))
    return canvas


def label_png(labels: Tensor) -> Image.Image:
    """The label map `[H, W]` as a 16-bit grey image: vocabularies pass 255.

    Raises:
        InputError: if a label does not fit 16 bits.
    """
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high > 65535:
        raise InputError(f"labels: a 16-bit PNG holds 0..65535, got {low}..{high}")
    return Image.fromarray(labels.cpu().numpy().astype(np.uint16))


def compact_labels(labels: Tensor, count: int) -> Tensor:
    """Labels of `count` classes in the smallest of the types uint8, int16 and int32 that holds them."""
    dtype = torch.uint8 if count <= 256 else torch.int16 if count <= 32768 else torch.int32
    return labels.to(dtype)


def _to_numpy(pixels: Tensor, factor: int) -> np.ndarray:
    """Pixels `[H, W, …]`, each repeated `factor` times in both directions."""
    if factor > 1:
        pixels = pixels.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    return pixels.cpu().numpy()


def _contours(labels: np.ndarray, rows: slice) -> np.ndarray:
    """Where lines between classes run, in some rows: bool `[rows, W]`, thicker on larger pictures."""
    width = max(1, round(labels.size**0.5 / 700))
    above = min(width, rows.start)
    part = labels[rows.start - above : rows.stop]
    lines = np.zeros(part.shape, bool)
    lines[width:] |= part[width:] != part[:-width]
    lines[:, width:] |= part[:, width:] != part[:, :-width]
    return lines[above:]


def _with_legend(
    size: tuple[int, int], shares: Tensor, classes: Sequence[str], colours: np.ndarray, max_legend: int
) -> Image.Image:
    """Room for a picture of `size`, and a panel of the largest classes on its right, at a suitable scale."""
    width, height = size
    em = max(_SMALLEST_FONT, round((width * height) ** 0.5 / 58))
    font = _font(em)
    order = shares.argsort(descending=True, stable=True).tolist()
    present = [index for index in order if shares[index] > 0]
    shown, rest = present[:max_legend], present[max_legend:]
    names = [_shorten(classes[index], font, _LONGEST_NAME * em) for index in shown]
    if rest:
        names.append(f"… and {len(rest)} more")
    percents = [_percent(float(shares[index])) for index in shown]
    if rest:
        percents.append(_percent(float(shares[rest].sum())))

    margin, row, swatch = em, round(1.7 * em), em
    name_at = width + margin + swatch + round(0.6 * em)
    percent_end = round(
        name_at
        + max(font.getlength(name) for name in names)
        + em
        + max(font.getlength(percent) for percent in percents)
    )
    size = (percent_end + margin, max(height, row * len(names) + 2 * margin))
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (name, percent) in enumerate(zip(names, percents, strict=True)):
        middle = margin + i * row + row // 2
        ink = _FAINT
        if i < len(shown):
            ink = _INK
            left, top = width + margin, middle - swatch // 2
            draw.rounded_rectangle(
                (left, top, left + swatch, top + swatch),
                radius=em // 4,
                fill=tuple(colours[shown[i]].tolist()),
                outline=_OUTLINE,  # white is on white paper otherwise
            )
        draw.text((name_at, middle), name, ink, font, anchor="lm")
        draw.text((percent_end, middle), percent, _FAINT, font, anchor="rm")
    return canvas


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _shorten(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """`name`, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(name + "…") > width:
        name = name[:-1]
    return name.rstrip(" ,") + "…"
