"""Small data sets in folders, as `catseg_fast.data` reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from catseg_fast.data.folder import FolderDataset
from support.scores import IGNORE

CLASSES = ["sky", "tree", "house, home"]
LABELS = np.array([[0, 1, 2, 255], [2, 2, 1, 0], [255, 0, 0, 1]], dtype=np.uint8)


def make_dataset(root: Path, labels: np.ndarray = LABELS, classes: int | list[str] = CLASSES) -> Path:
    """Write a data set of one picture, `a`."""
    names = classes if isinstance(classes, list) else [f"class {index}" for index in range(classes)]
    for folder in ("images", "annotations"):
        (root / folder).mkdir(parents=True)
    (root / "classes.json").write_text(json.dumps(names))
    add(root, "a", labels)
    return root


def add(root: Path, name: str, labels: np.ndarray, suffix: str = ".png") -> None:
    """Add a picture of random colours with its annotation."""
    pixels = np.random.default_rng(len(name)).integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "images" / f"{name}{suffix}")
    Image.fromarray(labels).save(root / "annotations" / f"{name}.png")


def write_data(root: Path, images: int, size: int = 20) -> FolderDataset:
    """Write pictures of different sizes, with three classes and pixels of no class."""
    generator = np.random.default_rng(0)
    for index in range(images):
        labels = generator.choice([0, 1, 2, IGNORE], (size + index, size + 4)).astype(np.uint8)
        if index:
            add(root, f"{index}", labels)
        else:
            make_dataset(root, labels)
    return FolderDataset(root)
