"""Options of `segment` that concern the labels, and the model's calls for each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catseg_fast.cli.options import no_nan
from catseg_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from catseg_fast.distributed.conductor import Conductor
    from catseg_fast.inference.segmentation import Segmentation
    from catseg_fast.model import CATSeg

# fmt: off
MinScore = Annotated[
    float | None,
    typer.Option(
        metavar="P", min=0, max=1, callback=no_nan,
        help="Label pixels as 'none of these' if their best class has a probability below P. By default "
        "every pixel has a class.",
    ),
]
AllClasses = Annotated[
    bool,
    typer.Option("--all-classes", help="Aggregate every class; upstream's v2 keeps the best 256 per crop."),
]
Best = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Aggregate only the N classes that fit a crop best."),
]
TopK = Annotated[
    int | None,
    typer.Option(
        metavar="K", min=1,
        help="Also write each pixel's K best classes and their probabilities, to NAME.top.npz.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory of a call besides weights and inputs, such as 2GiB."),
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Also print how the model runs: back end, classes, memory policy.")
]
Present = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", min=0, max=1, callback=no_nan,
        help="List only classes that cover at least this share of a picture, in legend, JSON and statistics.",
    ),
]
# fmt: on


def check_limit(all_classes: bool, best: int | None) -> None:
    """Check the options for the number of aggregated classes.

    Raises:
        typer.BadParameter: if both are given.
    """
    if all_classes and best is not None:
        raise typer.BadParameter("give --all-classes or this, not both", param_hint="--best")


def check_memory(memory: str | None) -> None:
    """Check an amount of memory.

    Raises:
        InputError: if it is not an amount.
    """
    if memory is not None:
        from catseg_fast.engine.schedule import parse_bytes

        try:
            parse_bytes(memory)
        except InputError as error:
            raise InputError(str(error).replace("memory_budget", "--memory", 1)) from None


def limit_classes(model: CATSeg, all_classes: bool, best: int | None) -> str | None:
    """Set how many classes a model aggregates; return a note if it drops some."""
    if all_classes:
        model.max_classes = None
    elif best is not None:
        model.max_classes = best
    total, limit = len(model.classes), model.max_classes
    if limit is None or total <= limit:
        return None
    return (
        f"of {total} classes, each crop aggregates the {limit} that fit it best, and drops the others; "
        "--all-classes aggregates all, --best N another number"
    )


@dataclass(frozen=True)
class Labelling:
    """A model, or a conductor of the ranks that share it, with the requested results.

    Attributes:
        top_k: classes per pixel, if more than one is requested.
        min_score: the probability below which a pixel has no class.
        present: smallest share of a picture for a class to be listed.
    """

    model: CATSeg | Conductor
    top_k: int | None = None
    min_score: float | None = None
    present: float | None = None

    def segment(self, image: Tensor | Path) -> Segmentation:
        """Label a picture `[3, H, W]`, or a file."""
        return self.model.segment(image, **self._asked).drop_below(self.min_score)

    def segment_batch(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Label pictures in one call of the model."""
        answers = self.model.segment_batch(images, **self._asked)
        return [answer.drop_below(self.min_score) for answer in answers]

    @property
    def settings(self) -> dict[str, Any]:
        """Return the options that differ from the defaults; results depend on them."""
        asked = {"top_k": self.top_k, "min_score": self.min_score, "present": self.present}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def described(self) -> dict[str, Any]:
        """Return the entries of the JSON files that describe it."""
        from catseg_fast.output.overlay import UNLABELLED_VALUE

        entries: dict[str, Any] = {}
        if self.min_score is not None:
            entries |= {"min_score": self.min_score, "unlabelled_value": UNLABELLED_VALUE}
        if self.present is not None:
            entries["present"] = self.present
        return entries

    @property
    def _asked(self) -> Mapping[str, Any]:
        return {} if self.top_k is None else {"top_k": self.top_k}
