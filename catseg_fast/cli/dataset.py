"""`catseg-fast dataset`: a published data set as a folder for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from catseg_fast.console import Debug, image_progress, plain_errors, stderr, stdout
from catseg_fast.text.class_lists import READY_LISTS, read_classes, ready_list

EXAMPLES = (
    "catseg-fast dataset ADEChallengeData2016/images/validation ADEChallengeData2016/annotations/validation "
    "CAT-Seg/datasets/ade150.json ade150 --first 1",
    "catseg-fast dataset VOC2010/JPEGImages VOC2010/annotations_detectron2/pc59_val "
    "CAT-Seg/datasets/pc59.json pc59",
    "catseg-fast dataset VOC2012/JPEGImages VOC2012/annotations_detectron2_bg/val pas-20b pas20b",
    "catseg-fast dataset leftImg8bit/val gtFine/val cityscapes.json cityscapes",
)


def dataset(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of pictures.")],
    annotations: Annotated[
        Path,
        typer.Argument(metavar="ANNOTATIONS", help="Folder of index maps, PNG or TIFF of 8 or 16 bits."),
    ],
    classes: Annotated[
        Path,
        typer.Argument(
            metavar="CLASSES",
            help="Class names: a .json file, a .txt file with one per line, or the name of a list, as of "
            "`segment --classes-list`.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    first: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="The first class's value; no class is right where it is less."),
    ] = 0,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the pictures, rather than link them.")] = False,
    debug: Debug = False,
) -> None:
    """Make a data set for `train` and `eval` from pictures and index maps.

    Folders are searched recursively. An index map has its picture's path and name, or its name in Cityscapes;
    pictures without one are skipped. The largest value of a map's 8 or 16 bits means that no class is right.
    Data sets that upstream's scripts in datasets/ have prepared can be used directly, and so can ADE20K-150
    with --first 1. An interrupted call continues when it is repeated.
    """
    with plain_errors(debug):
        from catseg_fast.data.published import import_dataset

        listed = str(classes).lower() in READY_LISTS and not classes.exists()
        names = ready_list(str(classes)).classes if listed else read_classes(classes)
        with image_progress("Converting") as advance:
            count = import_dataset(
                images, annotations, names, target, first=first, copy=copy, advance=advance,
                notice=lambda text: stderr.print(text),
            )  # fmt: skip
        stdout.print(f"{target}: {count} images, {len(names)} classes")
