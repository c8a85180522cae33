"""`catseg-fast train`: train a model on a folder of labelled pictures. Torch is imported when it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from catseg_fast.backend import default_device
from catseg_fast.cli.options import Device, MaxPixels
from catseg_fast.config import MAX_PIXELS, VARIANTS
from catseg_fast.console import Debug, choice, output_folder, plain_errors, say_note, stderr, stdout
from catseg_fast.data.class_list import read_class_list
from catseg_fast.distributed.torchrun import join, own_device
from catseg_fast.errors import InputError
from catseg_fast.text.prompts import check_classes

if TYPE_CHECKING:
    from collections.abc import Callable

    from catseg_fast.model import CATSeg
    from catseg_fast.training import Recipe
    from catseg_fast.training.trainer import Step

DEFAULT_VARIANT = "v2-vitb"
CLIP_RULES = ("attention", "full", "prompt", "none")
PRECISIONS = ("fp32", "fp16", "bf16")
WEIGHT_TYPES = {"fp32": "float32", "fp16": "float16"}
LINE_SECONDS = 30  # between lines of progress without a terminal

EXAMPLES = (
    "catseg-fast train --data coco-stuff --init clip.safetensors --device cuda --precision bf16",
    "torchrun --nproc-per-node 4 -m catseg_fast train --data coco-stuff --batch-size 16 --lr 4e-4",
    "catseg-fast train --data scenes --steps 2000 --classes-per-step 16 --no-colour --clip-finetune full",
)


def train(
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR", exists=True, file_okay=False,
            help="Data set: images/, annotations/ and classes.json.",
        ),
    ],
    output: Annotated[Path, output_folder("Folder of checkpoints, log and weights.")] = Path("trained"),
    variant: Annotated[
        str | None,
        choice(
            "--variant", tuple(VARIANTS),
            f"Variant to train; by default that of --init, or {DEFAULT_VARIANT}. One of",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            help="Weights to start from: a checkpoint as for segment --weights, or only CLIP, as OpenAI "
            "and open_clip publish it. By default all weights are random, even CLIP's.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimiser steps.")] = 80_000,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Pictures in a step, over all processes.")
    ] = 4,
    accumulate: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Parts into which a process divides its share of a step."),
    ] = 1,
    lr: Annotated[float, typer.Option(metavar="X", help="Largest learning rate.")] = 2e-4,
    warmup: Annotated[
        int, typer.Option(metavar="N", min=0, help="Steps in which the learning rate rises.")
    ] = 0,
    weight_decay: Annotated[
        float, typer.Option(metavar="X", min=0, help="Weight decay, except for norms and embeddings.")
    ] = 1e-4,
    clip_grad: Annotated[
        float, typer.Option(metavar="X", min=0, help="Largest norm of the gradient; 0 for no limit.")
    ] = 0.01,
    clip_finetune: Annotated[
        str, choice("--clip-finetune", CLIP_RULES, "Part of CLIP that is trained")
    ] = "attention",
    clip_multiplier: Annotated[
        float, typer.Option(metavar="X", min=0, help="Factor of the learning rate for CLIP.")
    ] = 0.01,
    backbone_multiplier: Annotated[
        float, typer.Option(metavar="X", min=0, help="The same for v1's backbone; 0 does not train it.")
    ] = 0.0,
    pooling: Annotated[
        int, typer.Option(metavar="N", min=1, help="Side of the pooling before the class attention.")
    ] = 2,
    crop_size: Annotated[int, typer.Option(metavar="N", min=1, help="Side of the crops in pixels.")] = 384,
    min_size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=1,
            help="Length of a picture's shorter side before cropping, repeatable: one is drawn for each "
            "picture. By default the crop's side.",
        ),
    ] = None,
    category_max_ratio: Annotated[
        float,
        typer.Option(metavar="X", min=0, max=1, help="Crop again if a class has a larger share of the crop."),
    ] = 1.0,
    colour: Annotated[
        bool,
        typer.Option(
            "--colour/--no-colour",
            help="Change brightness, contrast, saturation and hue at random; not for classes of colours.",
        ),
    ] = True,
    classes_per_step: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1,
            help="Classes that a step aggregates: those of its pictures, and random others. By default all.",
        ),
    ] = None,
    fewest_classes: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1,
            help="Draw the number of classes for each step, between N and --classes-per-step.",
        ),
    ] = None,
    random_synonyms: Annotated[
        bool,
        typer.Option("--random-synonyms", help="Call a class by one of its synonyms, drawn each step (v2)."),
    ] = False,
    precision: Annotated[str, choice("--precision", PRECISIONS, "Type of the computation")] = "fp32",
    max_pixels: MaxPixels = MAX_PIXELS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    workers: Annotated[
        int, typer.Option(metavar="N", min=0, help="Processes that load pictures; 0 for none.")
    ] = 2,
    save_every: Annotated[
        int, typer.Option(metavar="N", min=1, help="Steps between checkpoints; the last two are kept.")
    ] = 500,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh", help="Continue the run in the output folder if there is one, or start over."
        ),
    ] = True,
    weights_type: Annotated[
        str, choice("--weights-type", tuple(WEIGHT_TYPES), "Type of the weights written at the end")
    ] = "fp32",
    device: Device = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Train a model on a folder of labelled pictures; defaults are upstream's recipe.

    Writes checkpoints/ (the last two), log.jsonl and tensorboard/ (each step's loss, learning rate, gradient
    norm and time), and at the end model.safetensors. A run that was killed continues where its last
    checkpoint was written, to the same result. Under torchrun each process takes its share of every batch.
    """
    with plain_errors(debug):
        # Checks without torch come first, as its import takes seconds.
        from catseg_fast.checkpoints.hub import resolve

        classes, fold = read_class_list(data)
        check_classes(classes)
        if fold is not None:
            raise InputError(
                f"--data: classes of {data} have several names each, and training takes one; "
                "make the data set with a list of names"
            )
        start = None if init is None else resolve(init)

        import torch

        from catseg_fast.data.folder import FolderDataset
        from catseg_fast.identity import content_digest
        from catseg_fast.training import Recipe, Trainer
        from catseg_fast.training.output import check_output

        check_output(output)

        recipe = Recipe(
            steps=steps, batch_size=batch_size, accumulate=accumulate, lr=lr, warmup=warmup,
            clip_multiplier=clip_multiplier, backbone_multiplier=backbone_multiplier,
            weight_decay=weight_decay, clip_grad=clip_grad, clip_finetune=clip_finetune, pooling=pooling,
            crop_size=crop_size, min_sizes=tuple(min_size or ()), category_max_ratio=category_max_ratio,
            colour=colour, classes_per_step=classes_per_step, fewest_classes=fewest_classes,
            random_synonyms=random_synonyms, precision=precision, seed=seed,
        )  # fmt: skip
        pictures = FolderDataset(data, max_pixels)
        device = own_device(device or str(default_device()))
        with join(device) as processes:
            model = build_model(variant, pictures.classes, recipe, start).to(device)
            if processes.first and variant is None and init is not None:
                say_note(f"training {model.variant.name}, which {init} is for")
            trainer = Trainer(
                model, pictures, recipe, output, processes=processes, workers=workers, save_every=save_every,
                start=None if start is None else content_digest(start),
            )  # fmt: skip
            if not resume:
                trainer.start_over()
            elif trainer.resume():
                stderr.print(f"continuing after step {trainer.step} of {steps}")
            with progress(trainer.step, steps) as report:
                trainer.run(report)
            if processes.first:
                written = trainer.export(getattr(torch, WEIGHT_TYPES[weights_type]))
                stdout.print(f"{steps} steps done; wrote {written}")


def build_model(variant: str | None, classes: tuple[str, ...], recipe: Recipe, init: Path | None) -> CATSeg:
    """Build the model to train, on the CPU, with random weights or those of the file `init`.

    Args:
        variant: name of the variant; by default that of `init`.
        classes: class names.
        recipe: the training recipe.
        init: a checkpoint of CAT-Seg or of CLIP.

    Raises:
        FileNotFoundError, ValueError: if `init` is missing, or does not fit the variant.
    """
    from dataclasses import replace

    import torch

    from catseg_fast.checkpoints.checkpoint import read_checkpoint
    from catseg_fast.config import get_variant
    from catseg_fast.model import CATSeg
    from catseg_fast.training.start import load_start, variant_of

    state_dict = None if init is None else read_checkpoint(init)
    if variant is None and state_dict is not None:
        trained = variant_of(state_dict, str(init))
    else:
        trained = get_variant(variant or DEFAULT_VARIANT)
    torch.manual_seed(recipe.seed)
    model = CATSeg(
        replace(trained, pooling_size=(recipe.pooling, recipe.pooling)), classes,
        clip_finetune=recipe.clip_finetune, train_backbone=recipe.backbone_multiplier > 0,
    )  # fmt: skip
    if state_dict is not None:
        load_start(model, state_dict, str(init))
    return model


@contextmanager
def progress(first: int, steps: int) -> Iterator[Callable[[Step], None]]:
    """Yield a function to call after each step: it shows a bar on a terminal, or a line every half minute."""
    if not stderr.is_terminal:
        yield _Lines(first, steps)
        return
    columns: tuple[Any, ...] = (
        TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr, transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task("", total=steps, completed=first)
        yield lambda step: bar.update(task, advance=1, description=_describe(step))


class _Lines:
    """Prints a line every half minute, with the time left at the mean speed so far."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps
        self.start = self.last = time.monotonic()

    def __call__(self, step: Step) -> None:
        now, done = time.monotonic(), step.step + 1
        if now - self.last < LINE_SECONDS and done < self.steps:
            return
        self.last = now
        left = (now - self.start) / (done - self.first) * (self.steps - done)
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        stderr.print(f"{done}/{self.steps}  {_describe(step)}  {clock} left")


def _describe(step: Step) -> str:
    return f"loss {step.loss:.4f}, {step.seconds:.2f} s a step"
