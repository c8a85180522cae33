"""The loop over steps: batch, gradients, optimiser, log, checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from catseg_fast.distributed.torchrun import Processes
from catseg_fast.errors import InputError, RunError
from catseg_fast.files import exclusive
from catseg_fast.model import CATSeg
from catseg_fast.text.prompts import synonyms
from catseg_fast.training.checkpoints import Checkpoints, export
from catseg_fast.training.log import Log
from catseg_fast.training.optimiser import make_optimiser, set_learning_rate
from catseg_fast.training.recipe import Recipe
from catseg_fast.training.samples import (
    CLASSES,
    MODEL,
    Crops,
    Pictures,
    choose_classes,
    generator,
    remap,
    step_batches,
)

AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = "model.safetensors"
HOLDING = 10  # seconds in which the loader's processes notice that theirs was killed


@dataclass(frozen=True)
class Step:
    """Result of a step, counted from 0.

    Attributes:
        loss: mean over the step's pictures.
        lr: base learning rate.
        grad_norm: of all parameters' gradient, before it is clipped.
        classes: number of aggregated classes.
        seconds: from the last step's end to this one's.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    classes: int
    seconds: float


class Trainer:
    """Trains a model on labelled pictures.

    Args:
        model: on this process's device, with the weights to start from, and the recipe's pooling.
        pictures: a `catseg_fast.data.folder.FolderDataset`, or a similar object.
        recipe: settings of the run.
        output: folder of checkpoints, log and final weights.
        processes: this process among those of the run; by default the only one.
        workers: processes that load pictures, for each process of the run; 0 for none.
        save_every: steps from one checkpoint to the next.
        start: the digest of the file of the weights to start from, if there is one.

    Attributes:
        step: the next step.

    Raises:
        InputError: if there are no pictures, the recipe does not fit them, the model or the processes.
    """

    def __init__(
        self,
        model: CATSeg,
        pictures: Pictures,
        recipe: Recipe,
        output: Path,
        *,
        processes: Processes | None = None,
        workers: int = 0,
        save_every: int = 500,
        start: str | None = None,
    ) -> None:
        self.processes = processes or Processes()
        _check(model, pictures, recipe, self.processes)
        self.model, self.pictures, self.recipe, self.output = model, pictures, recipe, output
        self.workers, self.save_every, self.start = workers, save_every, start
        self.checkpoints = Checkpoints(output / "checkpoints")
        model.ignore_label = pictures.ignore_label
        model.set_classes(pictures.classes, training=True)
        self._names = list(pictures.classes)
        self.optimiser = make_optimiser(model, recipe)
        self.trained = [x for group in self.optimiser.param_groups for x in group["params"]]
        self.autocast = AUTOCAST[recipe.precision]
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=self.autocast == torch.float16)
        self.parallel: nn.Module = model
        if self.processes.count > 1:
            # Biases of attention's keys, and layers that CLIP's dense features skip, have no gradient.
            self.parallel = DistributedDataParallel(
                model, gradient_as_bucket_view=True, find_unused_parameters=True
            )
        self.step = 0

    def resume(self) -> bool:
        """Continue from the last checkpoint in the output folder; return whether there is one.

        Raises:
            InputError: if it is damaged, or of another recipe or data set; the message says what differs.
        """
        content = self.checkpoints.load()
        if content is None:
            return False
        if absent := [key for key in ("model", "optimiser", "scaler", "step", "run") if key not in content]:
            raise InputError(f"{self.output}: the last checkpoint has no {', '.join(absent)}")
        theirs, ours = content["run"], self._run()
        different = [
            f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
            for key in dict.fromkeys((*theirs, *ours))
            if theirs.get(key) != ours.get(key)
        ]
        if different:
            raise InputError("\n  ".join([f"{self.output} holds another run:", *different]))
        self.model.load_state_dict(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]
        return True

    def start_over(self) -> None:
        """Remove the checkpoints of an earlier run from the output folder."""
        if self.processes.first:
            self.checkpoints.clear()

    def run(self, report: Callable[[Step], None] = lambda _: None) -> None:
        """Take the remaining steps and save the result.

        Args:
            report: called after each step.

        Raises:
            RunError: if the loss or the gradient is not finite; the message names step and pictures. The
                last checkpoint is from before. Or if another run writes to the output folder.
            OSError: if a checkpoint cannot be written; the one before it is untouched.
        """
        with self._alone():
            self._run_all(report)

    def _alone(self) -> AbstractContextManager[Any]:
        """Hold the output folder, in the process that writes to it."""
        if not self.processes.first:
            return nullcontext()
        self.output.mkdir(parents=True, exist_ok=True)
        return exclusive(self.output, seconds=HOLDING)

    def _run_all(self, report: Callable[[Step], None]) -> None:
        if self.model.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as upstream
        self.model.train()
        _ = self._content  # while the pictures are those that are trained on
        batches = step_batches(
            Crops(self.pictures, self.recipe), self.step,
            rank=self.processes.rank, processes=self.processes.count,
            workers=self.workers, pin=self.model.device.type == "cuda",
        )  # fmt: skip
        log = Log(self.output, self.step) if self.processes.first else None
        try:
            self._run_steps(batches, log, report)
        finally:
            if log is not None:
                log.close()
        if self.processes.first:
            self.checkpoints.prune()
        self.processes.barrier()

    def export(self, dtype: torch.dtype) -> Path:
        """Write the weights as `model.safetensors`.

        Raises:
            OSError: if the file cannot be written.
        """
        path = self.output / WEIGHTS
        export(self.model.state_dict(), path, dtype, self.model.variant.name)
        return path

    def _run_steps(
        self, batches: Iterator[list[dict[str, Any]]], log: Log | None, report: Callable[[Step], None]
    ) -> None:
        end = time.perf_counter()
        for batch in batches:
            values = self._take(batch)
            seconds = time.perf_counter() - end
            end += seconds
            result = Step(self.step, *values, seconds)
            self.step += 1
            if log is not None:
                log.write(**asdict(result))
                if self.step % self.save_every == 0 or self.step == self.recipe.steps:
                    log.flush()
                    self._save()
            report(result)

    def _take(self, batch: list[dict[str, Any]]) -> tuple[float, float, float, int]:
        """Take an optimiser step; return loss, learning rate, gradient norm, classes."""
        recipe, rank = self.recipe, self.processes.rank
        # What the model draws follows from the step, so that it is the same after an interruption.
        torch.manual_seed(int(generator(recipe, MODEL, self.step, rank).integers(2**63)))
        names = [entry["name"] for entry in batch]
        batch = self._choose_classes(batch)
        size = len(batch) // recipe.accumulate
        total = torch.zeros((), device=self.model.device)
        for start in range(0, len(batch), size):
            with self._gradients_together(start + size >= len(batch)), self._autocast():
                loss = self.parallel(batch[start : start + size])["loss_sem_seg"] / recipe.accumulate
            self.scaler.scale(loss).backward()
            total += loss.detach()
        rate = recipe.learning_rate(self.step)
        set_learning_rate(self.optimiser, rate)
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.trained, recipe.clip_grad or float("inf"))
        value, norm_value = torch.stack([self.processes.mean(total), norm.to(total)]).tolist()
        self._check_finite(value, norm_value, names)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        return value, rate, norm_value, len(self._names)

    def _choose_classes(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Set the model's class names for a step, and make the labels indices into them."""
        recipe, classes, ignore = self.recipe, self.pictures.classes, self.pictures.ignore_label
        rng = generator(recipe, CLASSES, self.step, self.processes.rank)
        labels = [entry["sem_seg"] for entry in batch]
        count = recipe.classes_per_step
        if recipe.fewest_classes is not None and count is not None:
            count = int(rng.integers(recipe.fewest_classes, count, endpoint=True))
        chosen = choose_classes(labels, len(classes), ignore, count, rng)
        names = [classes[index] for index in chosen.tolist()]
        if recipe.random_synonyms:
            names = draw_synonyms(names, rng)
        if names != self._names:
            self.model.set_classes(names, training=True)
            self._names = names
        if len(chosen) == len(classes):
            return batch
        return [
            {**entry, "sem_seg": remap(entry["sem_seg"], chosen, len(classes), ignore)} for entry in batch
        ]

    def _check_finite(self, loss: float, norm: float, names: list[str]) -> None:
        """Raise a RuntimeError unless the loss is finite, and the gradient if nothing scales it."""
        what = None
        if not _finite(loss):
            what = f"the loss is {loss}"
        elif not _finite(norm) and not self.scaler.is_enabled():
            what = f"the norm of the gradient is {norm}"
        if what is not None:
            steps = self.checkpoints.steps()
            kept = (
                f"the last checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint yet"
            )
            raise RunError(f"{what} in step {self.step}, with the pictures {', '.join(names)}; {kept}")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.model.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )

    def _gradients_together(self, last: bool) -> AbstractContextManager[Any]:
        """Check whether this part's backward pass adds up the gradients of all processes."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return nullcontext()

    def _save(self) -> None:
        self.checkpoints.save(
            self.step,
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "run": self._run(),
            },
        )

    def _run(self) -> dict[str, Any]:
        """Return the facts that must be equal for a run to continue."""
        return {
            **asdict(self.recipe),
            "variant": self.model.variant.name,
            "classes": list(self.pictures.classes),
            "pictures": len(self.pictures),
            "data": self._content,
            "start": self.start,
        }

    @cached_property
    def _content(self) -> str:
        """The digest of the pictures and labels, all of which are read."""
        return self.pictures.fingerprint()


def draw_synonyms(labels: Sequence[str], rng: Any) -> list[str]:
    """Draw a synonym per class; if two classes would get the same one, keep the whole label."""
    drawn = []
    for label in labels:
        names = synonyms(label, "v1")
        drawn.append(names[rng.integers(len(names))])
    counts = Counter(drawn)
    return [label if counts[name] > 1 else name for label, name in zip(labels, drawn, strict=True)]


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _check(model: CATSeg, pictures: Pictures, recipe: Recipe, processes: Processes) -> None:
    if len(pictures) == 0:
        raise InputError("pictures: there are none")
    parts = processes.count * recipe.accumulate
    if recipe.batch_size % parts:
        raise InputError(
            f"batch_size: {recipe.batch_size} pictures do not go into {processes.count} processes "
            f"times {recipe.accumulate} parts"
        )
    if recipe.random_synonyms and model.variant.version == "v1":
        raise InputError("random_synonyms: v1 takes the mean over all synonyms, and draws none")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model: nothing in it is trained")
