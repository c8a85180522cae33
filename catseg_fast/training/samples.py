"""Samples of a run: an endless shuffled stream of crops, with random access to any step.

Everything follows from the recipe's seed and a crop's position in the stream, so that a run that continues
after an interruption sees the same samples, for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from catseg_fast.labels import class_indices
from catseg_fast.training.augment import augment
from catseg_fast.training.recipe import Recipe

# Purposes of random numbers; each has its own stream.
ORDER, AUGMENTATION, CLASSES, MODEL = range(4)


class Pictures(Protocol):
    """A labelled data set, as `catseg_fast.data.folder.FolderDataset`."""

    classes: tuple[str, ...]
    ignore_label: int
    names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def fingerprint(self) -> str:
        """A digest of the content of everything in it."""


def generator(recipe: Recipe, purpose: int, *position: int) -> np.random.Generator:
    """Return the generator of a purpose at a position of the run."""
    return np.random.default_rng((recipe.seed, purpose, *position))


class Crops(Dataset[dict[str, Any]]):
    """Endless stream: the crops of all pictures in a random order, then in another, and so on."""

    def __init__(self, pictures: Pictures, recipe: Recipe) -> None:
        self.pictures, self.recipe = pictures, recipe
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> dict[str, Any]:
        """{"image" uint8 [3, S, S], "sem_seg" int64 [S, S], "name"} of a position.

        Raises:
            InputError: if a label is neither a class index nor the ignore label; the message names the file.
        """
        epoch, place = divmod(position, len(self.pictures))
        if self._order is None or self._order[0] != epoch:
            order = generator(self.recipe, ORDER, epoch).permutation(len(self.pictures))
            self._order = (epoch, order)
        sample = self.pictures[int(self._order[1][place])]
        labels, ignore, classes = sample["sem_seg"], self.pictures.ignore_label, len(self.pictures.classes)
        labels = class_indices(labels, classes, ignore, f"{sample['name']}: label")
        rng = generator(self.recipe, AUGMENTATION, position)
        image, labels = augment(sample["image"], labels, self.recipe, ignore, rng)
        return {"image": image, "sem_seg": labels, "name": sample["name"]}


def step_batches(
    crops: Crops, first_step: int, *, rank: int = 0, processes: int = 1, workers: int = 0, pin: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """Yield one process's crops of every step from `first_step` on."""
    total, steps = crops.recipe.batch_size, crops.recipe.steps
    share = total // processes
    positions = [
        range(step * total + rank * share, step * total + (rank + 1) * share)
        for step in range(first_step, steps)
    ]
    loader: DataLoader[dict[str, Any]] = DataLoader(
        crops,
        batch_sampler=positions,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,
        pin_memory=pin,
    )
    return iter(loader)


def choose_classes(
    labels: Sequence[Tensor], total: int, ignore_label: int, count: int | None, rng: np.random.Generator
) -> Tensor:
    """Return a step's classes, ascending: those in `labels`, and others drawn up to `count`."""
    if count is None or count >= total:
        return torch.arange(total)
    seen = torch.zeros(total, dtype=torch.bool)
    for label_map in labels:
        seen[label_map[label_map != ignore_label].unique()] = True
    absent = (~seen).nonzero()[:, 0].numpy()
    wanted = min(max(count - int(seen.sum()), 0), len(absent))
    seen[torch.from_numpy(rng.choice(absent, wanted, replace=False))] = True
    return seen.nonzero()[:, 0]


def remap(labels: Tensor, classes: Tensor, total: int, ignore_label: int) -> Tensor:
    """Return labels as indices into `classes`, which hold all that occur; the ignore label stays."""
    table = torch.full((max(total, ignore_label + 1),), ignore_label)
    table[classes] = torch.arange(len(classes))
    return table[labels]
