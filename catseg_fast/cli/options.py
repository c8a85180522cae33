"""Options for the model and its classes, shared by commands. Torch is imported when a model is built."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catseg_fast.backend import BACKENDS, default_device
from catseg_fast.config import VARIANTS
from catseg_fast.console import choice, say_note, say_warning
from catseg_fast.errors import InputError, RunError
from catseg_fast.identity import is_scene
from catseg_fast.text.class_lists import (
    EVERYDAY_CLASSES,
    READY_LISTS,
    SCENE_CLASSES,
    Names,
    parse_classes,
    read_classes,
    ready_list,
    separator_notes,
)

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg

DTYPES = ("float32", "float16", "bfloat16")
BUNDLED_WEIGHTS = "demo"
BUNDLED_NOTE = (
    "the weights in this package know generated scenes only; for other pictures use --weights v2-vitl, which "
    "fetches upstream's"
)


def no_nan(value: float | None) -> float | None:
    """Callback of an option with a range, in which click takes NaN to be.

    Raises:
        typer.BadParameter: if the value is NaN.
    """
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not in the range")
    return value


# fmt: off
Classes = Annotated[
    str | None,
    typer.Option(
        metavar='"A; B; C"',
        help="Class names, separated by semicolons; commas separate synonyms of one class. Or a list's name, "
        f"as in --classes-list. By default {len(EVERYDAY_CLASSES)} everyday ones ("
        f"{', '.join(EVERYDAY_CLASSES)}); with the bundled weights, the contents of their scenes.",
    ),
]
ClassesFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", exists=True, dir_okay=False,
        help="Class names from a file in UTF-8: a .txt, one per line (# starts a comment), or a .json, a "
        "list of strings, Hugging Face's id2label, or an object with the several names of each class, "
        '{"background": ["wall", "floor"]}.',
    ),
]
ClassesList = Annotated[
    str | None, choice("--classes-list", READY_LISTS, "Class names of a data set, or nouns")
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="W",
        help="Checkpoint: a .pth or .safetensors file, its folder, a hub id, or a variant's name for "
        "upstream's weights. A hub id or name may end in @REVISION (preferably a commit), and all in "
        "#sha256=HEX, the digest of the file. By default the bundled weights, which are for generated scenes "
        "only; with --variant and no weights, they are random.",
    ),
]
VariantName = Annotated[
    str | None, choice("--variant", tuple(VARIANTS), "Required variant; by default recognised")
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …; by default a GPU if there is one.")
]
Dtype = Annotated[str, choice("--dtype", DTYPES, "Type of the weights")]
SlidingWindow = Annotated[
    bool,
    typer.Option(
        "--sliding-window/--whole",
        help="Overlapping crops and the whole picture, or only the whole picture: faster, coarser.",
    ),
]
Backend = Annotated[str, choice("--backend", BACKENDS, "Implementation of the aggregator")]
TextCache = Annotated[
    bool,
    typer.Option(
        "--text-cache/--no-text-cache",
        help="Keep the class names' text features in the user's cache folder for the next run.",
    ),
]
MaxPixels = Annotated[
    int,
    typer.Option(
        "--max-pixels", metavar="N", min=1,
        help="Most pixels of a picture, looked up before it is decoded: memory grows with them.",
    ),
]
Seed = Annotated[int, typer.Option(max=2**63 - 1, help="Seed of untrained weights.")]
# fmt: on


def weights_or_bundled(weights: str | None, variant: str | None) -> str | None:
    """Return the weights of the options, by default the bundled ones; None for random weights."""
    return BUNDLED_WEIGHTS if weights is None and variant in (None, BUNDLED_WEIGHTS) else weights


def default_classes(weights: str | None) -> list[str]:
    """Return the default class names."""
    return list(SCENE_CLASSES if weights == BUNDLED_WEIGHTS else EVERYDAY_CLASSES)


def class_names(
    classes: str | None, classes_file: Path | None, classes_list: str | None, weights: str | None
) -> Names:
    """Return the class names of the options; the command itself reports errors in a name."""
    if sum(option is not None for option in (classes, classes_file, classes_list)) > 1:
        raise typer.BadParameter(
            "give --classes, --classes-file or --classes-list, not both", param_hint="--classes"
        )
    try:
        if classes_file is not None:
            names = read_classes(classes_file)
        elif classes_list is not None:
            return ready_list(classes_list).classes
        else:
            names = parse_classes(classes) if classes is not None else default_classes(weights)
    except (OSError, ValueError) as error:
        hint = "--classes" if classes_file is None else "--classes-file"
        raise typer.BadParameter(str(error), param_hint=hint) from None
    note_separators(names, file=classes_file is not None)
    return names


def note_separators(names: Names, file: bool) -> None:
    """Print a note on names that may be several classes with wrong separators."""
    for note in separator_notes(names, file):
        say_note(note)


def note_on_bundled(pictures: Iterable[Path]) -> None:
    """Print a note that the bundled weights know only generated scenes, if a picture is not one."""
    if not all(is_scene(path) for path in pictures if path.exists()):
        say_note(BUNDLED_NOTE)


def build_model(
    weights: str | Path | None,
    variant: str | None,
    classes: Names,
    seed: int,
    *,
    device: str | None,
    dtype: str,
    **options: Any,
) -> CATSeg:
    """Build a model with a checkpoint's weights, or with a variant's random ones and a warning.

    Raises:
        InputError: if neither is given.
    """
    from catseg_fast.checkpoints.hub import resolve

    path = None if weights is None else resolve(weights)  # fail before torch is imported

    import torch

    from catseg_fast.model import CATSeg

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise RunError(f"--device: {device!r} is not available: {reason}") from error
    target, precision = device or default_device(), getattr(torch, dtype)
    if path is not None:
        return CATSeg.from_pretrained(
            path, classes, variant=variant, device=target, dtype=precision, **options
        )
    if variant is None:
        raise InputError("weights, variant: expected one of them")
    say_warning("no --weights: the model's weights are untrained (random), and the labels mean nothing")
    torch.manual_seed(seed)
    return CATSeg(variant, classes, **options).to(target, precision).eval()
