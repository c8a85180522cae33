"""`catseg-fast export`: write a model as ONNX. Torch is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from catseg_fast.cli.options import (
    BUNDLED_NOTE,
    BUNDLED_WEIGHTS,
    Classes,
    ClassesFile,
    ClassesList,
    Seed,
    TextCache,
    VariantName,
    Weights,
    build_model,
    class_names,
    weights_or_bundled,
)
from catseg_fast.console import Debug, plain_errors, say_note, stages, stderr, stdout
from catseg_fast.export.target import check_target
from catseg_fast.text.fold import split_fold
from catseg_fast.text.prompts import check_classes

EXAMPLES = (
    'catseg-fast export model.onnx --classes "sky; tree; person, man" --weights model_base.pth',
    "catseg-fast export model.onnx --classes-list ade-150 --weights v2-vitl",
    "catseg-fast export model.onnx --classes-file classes.txt --weights v2-vitl --crops 5",
)


def export(
    target: Annotated[Path, typer.Argument(metavar="DST", help="The .onnx file to write.")],
    classes: Classes = None,
    classes_file: ClassesFile = None,
    classes_list: ClassesList = None,
    weights: Weights = None,
    variant: VariantName = None,
    crops: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images per call; 5 for a whole sliding window.")
    ] = 1,
    text_cache: TextCache = True,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:  # fmt: skip
    r"""Write a model as ONNX, from pixels and text features to logits, for any number of classes.

    NAME.classes.npz, with the classes' names and text features, and NAME.json, which describes inputs,
    outputs and the steps before and after, are written next to DST. Another vocabulary only needs another
    .npz. The command takes some minutes, and needs `pip install "catseg-fast\[export]"`.
    """
    weights = weights_or_bundled(weights, variant)
    names = class_names(classes, classes_file, classes_list, weights)
    with plain_errors(debug):
        # Checks without torch come first, as its import takes seconds.
        check_classes(split_fold(names)[0])
        check_target(target)
        if weights == BUNDLED_WEIGHTS:
            say_note(BUNDLED_NOTE)
        with stderr.status("Loading the model …"):
            model = build_model(
                weights, variant, names, seed, device="cpu", dtype="float32", text_cache=text_cache
            )
        from catseg_fast.export import export_onnx

        with stages() as begin:
            written = export_onnx(model, target, crops=crops, begin=begin)
    for path in written:
        stdout.print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
