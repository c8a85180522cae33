"""Pictures of a segmentation: coloured overlay with a legend, and the label map as a 16-bit PNG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from catseg_fast.errors import InputError
from catseg_fast.labels import NONE, NONE_NAME
from catseg_fast.numeric import share
from catseg_fast.output.colours import Colours, colours_for
from catseg_fast.output.lettering import draw_text, shorten, text_width
from catseg_fast.output.strips import row_strips

_PAPER, _INK, _FAINT = (250, 250, 250), (35, 35, 40), (120, 120, 128)
_OUTLINE = (190, 190, 196)
_SMALLEST_SIDE = 360  # with a legend, smaller pictures are enlarged by a whole number
_SMALLEST_FONT = 13
_LONGEST_NAME = 12  # in ems
UNLABELLED_VALUE = 65535  # stands for the label -1 in 16 bits


def class_shares(labels: Tensor, count: int) -> Tensor:
    """Return the share of the pixels of `labels` [H, W] of each of `count` classes: float64 `[count]`.

    Pixels with the label -1 have no class: the shares then add up to less than 1.

    Raises:
        InputError: if a label is not in -1..count-1.
    """
    low, high = labels.min().item(), labels.max().item()
    if low < NONE or high >= count:
        raise InputError(f"labels: expected values in 0..{count - 1} for {count} classes, got {low}..{high}")
    return count_pixels(labels, count)[1:].double() / labels.numel()


def count_pixels(labels: Tensor, count: int) -> Tensor:
    """The pixels without a class, and of each of `count` classes: int64 `[1 + count]`."""
    pixels = torch.zeros(count + 1, dtype=torch.int64, device=labels.device)
    for rows in row_strips(*labels.shape):
        pixels += torch.bincount(labels[rows].flatten().long() + 1, minlength=count + 1)
    return pixels


def overlay(
    image: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    alpha: float = 0.55,
    legend: bool = True,
    max_legend: int = 16,
    colours: Colours | None = None,
    present: float = 0.0,
) -> Image.Image:
    """Blend the classes' colours over an image, and list the present classes beside it.

    Where no class fits, the image is unchanged.

    Args:
        image: `[3, H, W]`, RGB in 0..255.
        labels: integers `[H, W]`, indices into `classes`; -1 where no class fits.
        classes: class names.
        alpha: share of the colours, 0 (only the image) to 1 (only the colours).
        legend: whether to add the panel; small pictures are then enlarged to go with its text.
        max_legend: classes in the legend, those with the largest areas; the rest is summed up.
        colours: of the classes, uint8 `[T, 3]`; by default those that `colours_for` chooses for this picture.
        present: least share of the pixels of a class in the legend; the rest is summed up.

    Raises:
        InputError: if the shapes disagree, a label has no class, or `alpha` or `present` is not in 0..1.
    """
    if image.ndim != 3 or image.shape[0] != 3 or labels.shape != image.shape[1:]:
        raise InputError(
            f"labels: expected [H, W] of an image [3, H, W], got labels {list(labels.shape)} "
            f"and image {list(image.shape)}"
        )
    alpha, present = share(alpha, "alpha"), share(present, "present")
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
        unlabelled = float(count_pixels(labels, len(classes))[0]) / labels.numel()
        entries = _entries(shares, unlabelled, classes, colours, max_legend, present)
        canvas = _with_legend((width, height), entries)
    else:
        canvas = Image.new("RGB", (width, height))
    for rows in row_strips(height, width):  # nothing of the picture's size is made beside the canvas
        part, paint = np.ascontiguousarray(photo[rows]), colours[label_map[rows]]
        none = label_map[rows] == NONE
        paint[none] = part[none]
        paint[_contours(label_map, rows)] = 255
        canvas.paste(Image.blend(Image.fromarray(part), Image.fromarray(paint), alpha), (0, rows.start))
    return canvas


def label_png(labels: Tensor) -> Image.Image:
    """Return the label map `[H, W]` as a 16-bit grey image; the label -1 is stored as 65535.

    Raises:
        InputError: if a label does not fit 16 bits.
    """
    low, high = labels.min().item(), labels.max().item()
    if low < NONE or high >= UNLABELLED_VALUE:
        raise InputError(f"labels: a 16-bit PNG holds 0..{UNLABELLED_VALUE - 1} and -1, got {low}..{high}")
    return Image.fromarray(labels.cpu().numpy().astype(np.int32).astype(np.uint16))  # -1 becomes 65535


def compact_labels(labels: Tensor, count: int) -> Tensor:
    """Labels of `count` classes, -1 among them, in the smallest signed type that holds them."""
    dtype = torch.int8 if count <= 128 else torch.int16 if count <= 32768 else torch.int32
    return labels.to(dtype)


def _to_numpy(pixels: Tensor, factor: int) -> np.ndarray:
    """Pixels `[H, W, …]`, each repeated `factor` times in both directions."""
    if factor > 1:
        pixels = pixels.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    return pixels.cpu().numpy()


def _contours(labels: np.ndarray, rows: slice) -> np.ndarray:
    """Find the lines between classes in some rows: bool `[rows, W]`, thicker on larger pictures."""
    width = max(1, round(labels.size**0.5 / 700))
    above = min(width, rows.start)
    part = labels[rows.start - above : rows.stop]
    lines = np.zeros(part.shape, bool)
    lines[width:] |= part[width:] != part[:-width]
    lines[:, width:] |= part[:, width:] != part[:, :-width]
    return lines[above:]


# A line of the legend: name, share of the pixels, and colour; None where the picture stays as it is.
_Entry = tuple[str, float, tuple[int, ...] | None]


def _entries(
    shares: Tensor, unlabelled: float, classes: Sequence[str], colours: Colours, count: int, least: float
) -> tuple[list[_Entry], list[float]]:
    """The `count` largest classes of at least a share, largest first; and the shares of the others."""
    order = shares.argsort(descending=True, stable=True).tolist()
    present = [(index, share) for index in order if (share := float(shares[index])) > 0]
    shown = [item for item in present if item[1] >= least][:count]
    entries: list[_Entry] = [
        (classes[index], share, tuple(colours[index].tolist())) for index, share in shown
    ]
    if unlabelled:
        entries.append((NONE_NAME, unlabelled, None))
    return entries, [share for _, share in present[len(shown) :]]


def _with_legend(size: tuple[int, int], legend: tuple[list[_Entry], list[float]]) -> Image.Image:
    """Room for a picture of `size`, and a panel of the largest classes on its right, at a suitable scale."""
    width, height = size
    em = max(_SMALLEST_FONT, round((width * height) ** 0.5 / 58))
    shown, rest = legend
    names = [shorten(name, em, _LONGEST_NAME * em) for name, _, _ in shown]
    percents = [_percent(share) for _, share, _ in shown]
    if rest:
        names.append(f"… and {len(rest)} more")
        percents.append(_percent(sum(rest)))

    margin, row, swatch = em, round(1.7 * em), em
    name_at = width + margin + swatch + round(0.6 * em)
    percent_end = round(
        name_at
        + max(text_width(name, em) for name in names)
        + em
        + max(text_width(percent, em) for percent in percents)
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
            box, colour = (left, top, left + swatch, top + swatch), shown[i][2]
            # White is on white paper without an outline.
            draw.rounded_rectangle(box, radius=em // 4, fill=colour, outline=_OUTLINE)
            if colour is None:
                edge = em // 4
                draw.line((left + edge, top + swatch - edge, left + swatch - edge, top + edge), _FAINT)
        draw_text(draw, (name_at, middle), name, em, ink)
        draw_text(draw, (percent_end - text_width(percent, em), middle), percent, em, _FAINT)
    return canvas


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
