"""Videos and large pictures in `segment`, and their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catseg_fast.cli.options import no_nan
from catseg_fast.errors import InputError
from catseg_fast.imports import require_pyav, require_rasterio

if TYPE_CHECKING:
    from catseg_fast.cli.batch import Outcome
    from catseg_fast.cli.inputs import Picture
    from catseg_fast.cli.labelling import Labelling
    from catseg_fast.model import CATSeg

    Run = Callable[[int, Picture, Callable[[int, int], object]], Outcome]

VIDEOS = frozenset(
    {".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm"}
)  # by suffix

# fmt: off
TileSize = Annotated[
    int | None,
    typer.Option(
        "--tiles", metavar="SIZE", min=1,
        help="Segment large pictures at their own resolution, in tiles of SIZE pixels; memory does not grow "
        "with them.",
    ),
]
Overlap = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Pixels that tiles share; by default an eighth of SIZE."),
]
Video = Annotated[
    bool, typer.Option("--video", help="Each folder holds the frames of a video, in their names' order.")
]
Every = Annotated[int, typer.Option(metavar="N", min=1, help="Only each Nth frame of a video.")]
FPS = Annotated[
    float,
    typer.Option(
        metavar="F", min=0.01, max=1000, callback=no_nan, help="Frames per second of --video's folders."
    ),
]
# fmt: on


def check_tiling(tiles: int | None, overlap: int | None, others: Mapping[str, object]) -> None:
    """Check the options of tiles.

    Args:
        tiles, overlap: the options.
        others: by name, options that do not go with tiles, and whether they are given.

    Raises:
        typer.BadParameter: if one is given without the other, or with one of the others.
    """
    if tiles is None:
        if overlap is not None:
            raise typer.BadParameter("give --tiles SIZE, too", param_hint="--overlap")
        return
    for name, given in others.items():
        if given:
            raise typer.BadParameter(f"does not go with {name}", param_hint="--tiles")


def divide(
    found: Sequence[Picture], tiles: int | None, video: bool, every: int, top_k: int | None
) -> tuple[list[Picture], list[Picture]]:
    """Return pictures, and videos and folders of frames; the options are those of `segment`.

    Raises:
        InputError: if options are given that need a video, and there is none; or that videos do not have.
        MissingPackageError: if a package is missing that reads what there is.
    """
    clips = [picture for picture in found if picture.path.suffix.lower() in VIDEOS or picture.path.is_dir()]
    if tiles is not None:
        require_rasterio()
    if clips:
        require_pyav()
        if top_k is not None:
            raise InputError(f"--top-k: {clips[0].path} is a video, of which only the best class is written")
    elif found and (video or every > 1):
        option = "--video" if video else "--every"
        raise InputError(f"{option}: there is no video and no folder of frames")
    return [picture for picture in found if picture not in clips], clips


def tiling(
    model: CATSeg,
    labelling: Labelling,
    about: Mapping[str, Any],
    tiles: int,
    overlap: int | None,
    alpha: float,
    overwrite: bool,
) -> Run:
    """Return what segments a large picture.

    Raises:
        InputError: if tiles are too small, or overlap too much.
    """
    from catseg_fast.cli.tiles import Tiles
    from catseg_fast.inference.tiles import TileGrid, check_tiles, default_overlap

    check_tiles(model, tiles)
    grid = TileGrid((tiles, tiles), tiles, default_overlap(tiles) if overlap is None else overlap)
    return Tiles(model, labelling, about, tiles, grid.overlap, alpha, overwrite).run


def filming(
    model: CATSeg,
    labelling: Labelling,
    about: Mapping[str, Any],
    every: int,
    fps: float,
    alpha: float,
    overwrite: bool,
) -> Run:
    """Return what segments a video."""
    from catseg_fast.cli.video import Clips

    rate = Fraction(fps).limit_denominator(1000)
    return Clips(labelling, model.label_classes, about, alpha, every, rate, overwrite).run
