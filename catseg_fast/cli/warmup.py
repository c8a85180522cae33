"""`catseg-fast warmup`: preparation of first calls. Torch is imported when it runs."""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from catseg_fast.backend import choose_backend, default_device
from catseg_fast.cli.options import (
    Backend,
    Classes,
    ClassesFile,
    ClassesList,
    Device,
    Dtype,
    Seed,
    SlidingWindow,
    TextCache,
    VariantName,
    Weights,
    build_model,
    class_names,
    weights_or_bundled,
)
from catseg_fast.console import Debug, plain_errors, stderr, stdout

EXAMPLES = (
    "catseg-fast warmup --weights v2-vitl --classes-list ade-150",
    "catseg-fast warmup --weights v2-vitl --classes-file classes.txt --size 480x640 --size 1080x1920",
)


def parse_sizes(values: list[str]) -> list[tuple[int, int]]:
    """Return (height, width) of each HxW."""
    sizes = []
    for value in values:
        match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", value)
        if match is None:
            raise typer.BadParameter(f"{value!r} is not HxW, such as 480x640")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def warmup(
    classes: Classes = None,
    classes_file: ClassesFile = None,
    classes_list: ClassesList = None,
    weights: Weights = None,
    variant: VariantName = None,
    size: Annotated[
        list[str], typer.Option(metavar="HxW", help="Height and width of pictures to come, repeatable.")
    ] = ["480x640"],  # noqa: B006
    device: Device = None,
    dtype: Dtype = "float32",
    sliding_window: SlidingWindow = True,
    backend: Backend = "auto",
    text_cache: TextCache = True,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Prepare first calls: encode the class names, and compile and check kernels, all kept on disk.

    The next process with the same weights, classes and options finds them, on a GPU of the same kind. The
    command prints their folders, which can be copied into a container.
    """
    sizes = parse_sizes(size)
    weights = weights_or_bundled(weights, variant)
    names = class_names(classes, classes_file, classes_list, weights)
    with plain_errors(debug):
        from catseg_fast.files import user_cache

        choose_backend(backend, device or default_device())  # fail before the model is loaded
        with stderr.status("Loading the model …"):
            model = build_model(
                weights, variant, names, seed, device=device, dtype=dtype,
                sliding_window=sliding_window, backend=backend, text_cache=text_cache,
            )  # fmt: skip
        start = time.perf_counter()
        model.text_features()
        middle = time.perf_counter()
        model.warmup(sizes)
        end = time.perf_counter()
        folders = {"text features, check, launch configs": str(user_cache())}
        if choose_backend(backend, model.device) == "triton":
            import triton  # which exists only for Linux

            folders["kernels"] = triton.knobs.cache.dir
    stdout.print(f"text features {middle - start:.1f} s, calls {end - middle:.1f} s")
    for content, folder in folders.items():
        stdout.print(f"{content}: {folder}")
