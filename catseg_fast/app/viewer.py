"""Data of the page's viewer: pictures in data URIs, and the classes that occur."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from catseg_fast.app.workbench import Report
from catseg_fast.engine.schedule import format_bytes
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.labels import NONE, NONE_NAME
from catseg_fast.output.colours import colours_for
from catseg_fast.output.overlay import class_shares

# From no score to the highest one: dark blue, violet, red, orange, pale yellow.
_HEAT = np.array([[8, 10, 40], [72, 22, 110], [168, 42, 96], [236, 100, 48], [252, 186, 60], [255, 250, 200]])


def viewer_data(photo: Tensor, segmentation: Segmentation) -> dict[str, Any]:
    """Return the viewer's picture and legend.

    "labels" is a PNG of the photo's size. Its red and green are the low and the high byte of an index into
    "classes", the classes that occur, the largest first; its blue is the score, 0..255. Where no class fits,
    the index is that of the last entry, which has no colour.
    """
    labels, count = segmentation.labels, len(segmentation.classes)
    shares = class_shares(labels, count)
    order = [index for index in shares.argsort(descending=True, stable=True).tolist() if shares[index] > 0]
    rank = np.full(count + 1, len(order))  # the last one is of the label -1
    rank[order] = np.arange(len(order))
    ranks = rank[labels.numpy()]
    scores = (segmentation.scores.clamp(0, 1) * 255).round().numpy()
    packed = np.stack([ranks & 255, ranks >> 8, scores], axis=-1).astype(np.uint8)
    pixels = photo.permute(1, 2, 0).numpy()
    colours = colours_for(segmentation.classes, labels.numpy(), pixels)
    share = (labels == NONE).double().mean().item()
    none = [{"index": NONE, "name": NONE_NAME, "colour": None, "share": share}] if share else []
    return {
        "photo": _uri(Image.fromarray(pixels), "JPEG"),
        "labels": _uri(Image.fromarray(packed), "PNG"),
        "width": labels.shape[1],
        "height": labels.shape[0],
        "total": count,
        "classes": [
            {
                "index": index,
                "name": segmentation.classes[index],
                "colour": colours[index].tolist(),
                "share": shares[index].item(),
            }
            for index in order
        ]
        + none,
    }


def heat_data(photo: Tensor, segmentation: Segmentation, index: int) -> dict[str, Any]:
    """Return the score map of a class over the grey photo, and the ends of the scale."""
    scores = segmentation.score_map(index).numpy()
    top = float(scores.max())
    at = np.clip(scores / max(top, 1e-6), 0, 1)[..., None] * (len(_HEAT) - 1)
    low = np.minimum(at.astype(np.int64), len(_HEAT) - 2)
    heat = _HEAT[low[..., 0]] + (at - low) * (_HEAT[low[..., 0] + 1] - _HEAT[low[..., 0]])
    grey = photo.float().mean(dim=0).numpy()[..., None]
    picture = (0.78 * heat + 0.22 * grey).round().astype(np.uint8)
    stops = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in _HEAT.tolist())
    return {
        "picture": _uri(Image.fromarray(picture), "JPEG"),
        "name": segmentation.classes[index],
        "top": top,
        "mean": float(scores.mean()),
        "gradient": f"linear-gradient(90deg, {stops})",
    }


def report_html(report: Report) -> str:
    """Return tiles with times and memory, and the unfoldable description of the run."""
    stages = (
        ("Picture encoding", report.encoding),
        ("Class names", report.text),
        ("Aggregation and label map", report.aggregation),
    )
    tiles = [
        (title, "kept" if seconds is None else f"{seconds:.2f} s", "from before" if seconds is None else "")
        for title, seconds in stages
    ]
    tiles.append(("Peak memory", f"+{format_bytes(report.peak)}", f"{format_bytes(report.held)} in all"))
    body = "".join(
        f'<div class="cf-tile"><span>{title}</span><b>{escape(value)}</b><i>{escape(note)}</i></div>'
        for title, value, note in tiles
    )
    plan = f"<details><summary>How it ran</summary><pre>{escape(report.plan)}</pre></details>"
    return f'<div class="cf-tiles">{body}</div>{plan}'


def _uri(picture: Image.Image, form: str) -> str:
    buffer = BytesIO()
    picture.save(buffer, form, **({"quality": 90} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
