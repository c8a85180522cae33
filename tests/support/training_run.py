"""A small training run, for tests and for the processes that they start.

    python -m support.training_run FOLDER [--kill STEP]

trains in FOLDER with the trainer of `make_trainer`, in the number of processes of torchrun's variables. With
--kill, the process kills itself after a step, as if by kill -9.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catseg_fast.distributed.torchrun import Processes, join
from catseg_fast.training import Recipe, Trainer
from support.tiny import V2, tiny_model

CLASSES = ("wall", "building, edifice", "sky", "floor", "tree, oak", "sea")
RECIPE: dict[str, Any] = {
    "steps": 4, "batch_size": 2, "lr": 1e-3, "clip_multiplier": 0.1, "clip_grad": 0.0, "crop_size": 96,
    "warmup": 1, "seed": 7,
}  # fmt: skip


class Blocks:
    """Five pictures of coloured blocks, whose classes are the colours."""

    classes = CLASSES
    ignore_label = 255
    names = tuple(f"picture-{index}" for index in range(5))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        blocks = torch.randint(0, len(CLASSES), (4, 5), generator=generator)
        labels = blocks.repeat_interleave(30, 0).repeat_interleave(30, 1)
        labels[:3] = self.ignore_label
        return {"image": paint(labels), "sem_seg": labels, "name": self.names[index]}

    def fingerprint(self) -> str:
        return "five pictures of blocks"


def paint(labels: Tensor) -> Tensor:
    """Return a picture with a colour for each label, uint8 `[3, H, W]`."""
    return torch.stack([labels * 40, 255 - labels * 40, labels * 20]).clamp(0, 255).to(torch.uint8)


def make_trainer(folder: Path, processes: Processes | None = None, **changes: Any) -> Trainer:
    """Return a trainer of the tiny model; `changes` are settings of the recipe or the trainer."""
    own = {key: changes.pop(key) for key in ("workers", "save_every") if key in changes}
    model = tiny_model(variant=V2, classes=CLASSES, backend="torch")
    return Trainer(
        model, Blocks(), Recipe(**RECIPE | changes), folder, processes=processes, **{"save_every": 2} | own
    )


def trained(trainer: Trainer) -> dict[str, Tensor]:
    """Return the trained parameters."""
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def main(folder: str, kill: str | None = None, behind: str = "-1") -> None:
    with join("cpu") as processes:
        trainer = make_trainer(Path(folder), processes)

        def report(step: Any) -> None:
            if kill and step.step == int(behind):
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.run(report)
        torch.save(trained(trainer), Path(folder) / f"weights-{processes.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
