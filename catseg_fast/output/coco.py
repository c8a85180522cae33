"""COCO JSON files of a picture's segmentation: an annotation per class, as RLE or as polygons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catseg_fast.identity import JSON_MARK

if TYPE_CHECKING:
    from catseg_fast.output.formats import Labelled

Ring = NDArray[np.float64]  # corners (x, y) [N, 2] of a closed line; the first is not repeated


def write_rle(path: Path, labelled: Labelled) -> None:
    """Write a COCO file with a compressed RLE per class."""
    _write(path, labelled, dict.fromkeys(labelled.present()))


def write_polygons(path: Path, labelled: Labelled) -> None:
    """Write a COCO file with polygons along the pixels' edges.

    As polygons in COCO have no holes, a line of zero width joins a hole to the outline, so that the decoded
    polygons give the same pixels.
    """
    from rasterio.features import shapes

    polygons: dict[int, list[list[float]]] = {index: [] for index in labelled.present()}
    labels = labelled.labels.astype(np.int32)
    for shape, value in shapes(labels, mask=labels >= 0):
        outline, *holes = (np.array(ring[:-1]) for ring in shape["coordinates"])
        polygons[int(value)].append(_without_holes(outline, holes).ravel().tolist())
    _write(path, labelled, polygons)


def _without_holes(outline: Ring, holes: list[Ring]) -> Ring:
    """A closed line around the same area: each hole is reached from the nearest corner, and left again."""
    for hole in holes:
        away = ((outline[:, None] - hole[None]) ** 2).sum(-1) if len(outline) * len(hole) < 10**6 else None
        if away is None:  # too many pairs: from the hole's first corner only
            away = ((outline - hole[0]) ** 2).sum(-1)[:, None]
        i, j = np.unravel_index(int(away.argmin()), away.shape)
        tour = np.concatenate([hole[j:], hole[: j + 1]])
        outline = np.concatenate([outline[: i + 1], tour, outline[i:]])
    return outline


def _write(path: Path, labelled: Labelled, segments: Mapping[int, list[list[float]] | None]) -> None:
    """Write a COCO file; a class without polygons gets its RLE."""
    from pycocotools import mask as coco

    height, width = labelled.labels.shape
    annotations: list[dict[str, Any]] = []
    for number, (index, polygons) in enumerate(segments.items(), 1):
        rle = coco.encode(np.asfortranarray(labelled.labels == index, dtype=np.uint8))
        compressed = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": index + 1,
                "segmentation": compressed if polygons is None else polygons,
                "area": int(coco.area(rle)),
                "bbox": coco.toBbox(rle).tolist(),
                "iscrowd": 0,
            }
        )
    content = {
        "info": {"description": "catseg-fast segmentation", JSON_MARK: labelled.mark},
        "licenses": [],
        "images": [{"id": 1, "file_name": labelled.file_name, "width": width, "height": height}],
        "categories": [
            {"id": index + 1, "name": name, "supercategory": ""}
            for index, name in enumerate(labelled.classes)
        ],
        "annotations": annotations,
    }
    text = json.dumps(content, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # a file's name may not be UTF-8
