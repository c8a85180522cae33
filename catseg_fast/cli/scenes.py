"""`catseg-fast scenes`: write generated scenes as a data set. The generator is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from catseg_fast.console import Debug, check_folder, choice, plain_errors, stderr, stdout

SPLITS = ("train", "held-out", "held-out-200", "synonyms")

EXAMPLES = (
    "catseg-fast scenes scenes/train --split train --count 5000",
    "catseg-fast scenes scenes/held-out --split held-out --count 200 --seed 1000",
)


def scenes(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", callback=check_folder, help="Folder of images/, annotations/ and classes.json."
        ),
    ],
    split: Annotated[
        str,
        choice(
            "--split", SPLITS,
            "Contents of the scenes: compositions for training; held-out ones, by 20 classes, by 200 "
            "classes most of which are absent, or only by synonyms",
        ),
    ] = "train",
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Number of scenes.")] = 200,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Another seed gives other scenes.")] = 0,
    size: Annotated[int, typer.Option(metavar="PIXELS", min=96, help="Side of the square pictures.")] = 384,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Write generated scenes with labels for all pixels, as a data set for `train` and `eval`.

    Things of a pattern, a colour and a shape ("striped red ring") overlap on grounds ("wooden floor").
    Existing scenes in the folder are kept, so that an interrupted call can be repeated.
    """
    with plain_errors(debug):
        from catseg_fast.data.scenes import write_dataset

        columns = (TextColumn("Drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            task = progress.add_task("Drawing", total=count)
            write_dataset(
                folder, split, count, seed=seed, size=(size, size), advance=lambda: progress.advance(task)
            )
    stdout.print(f"{count} scenes of the split {split!r} are in {folder}")
