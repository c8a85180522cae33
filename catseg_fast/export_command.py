"""`catseg-fast export`: write a model as ONNX. Torch is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from catseg_fast.config import VARIANTS
from catseg_fast.console import Debug, choice, plain_errors, stderr, stdout

EXAMPLES = (
    'catseg-fast export model.onnx --classes "sky; tree; person, man" --weights model_base.pth',
    "catseg-fast export model.onnx --classes-file classes.txt --weights v2-vitl --crops 5",
)


def export(
    target: Annotated[Path, typer.Argument(metavar="DST", help="The .onnx file to write.")],
    weights: Annotated[
        str,
        typer.Option(
            metavar="W",
            help="Checkpoint: a .pth or .safetensors file, its folder, a hub id, or a variant's name for "
            "upstream's weights.",
        ),
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar='"A; B; C"',
            help="Class names, separated by semicolons; commas separate synonyms of one class. By default "
            "some everyday ones.",
        ),
    ] = None,
    classes_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False,
            help="Class names from a .txt file, one a line, or a .json file, a list of strings.",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        choice("--variant", tuple(VARIANTS), "What the checkpoint must be, else told from its content"),
    ] = None,
    crops: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images of a call: 5 for a sliding window at once.")
    ] = 1,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Write a model as ONNX, from pixels and text features to logits; any number of classes.

    Beside DST come NAME.classes.npz, the classes' names and text features, and NAME.json, which tells inputs,
    outputs and what comes before and behind them. Another vocabulary needs another .npz alone. The command
    takes some minutes, and needs `pip install "catseg-fast[export]"`.
    """
    from catseg_fast.cli import class_names  # which registers this command

    names = class_names(classes, classes_file)
    with plain_errors(debug):
        from catseg_fast.export import check_target, export_onnx
        from catseg_fast.model import CATSeg

        check_target(target)  # fail before the model is loaded
        with stderr.status("Loading the model …"):
            model = CATSeg.from_pretrained(weights, names, variant=variant, device="cpu")
        with stderr.status("Exporting …"):
            written = export_onnx(model, target, crops=crops)
    for path in written:
        stdout.print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True, highlight=False)
