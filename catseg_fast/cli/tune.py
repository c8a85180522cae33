"""`catseg-fast tune`: find this GPU's fastest launch configs. Torch is imported when it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from catseg_fast.cli.options import no_nan
from catseg_fast.console import Debug, check_folder, choice, plain_errors, say_error, say_note, stderr, stdout
from catseg_fast.errors import RunError
from catseg_fast.kernels import TUNABLE_OPS

if TYPE_CHECKING:
    import torch

    from catseg_fast.engine.tuner import Outcome

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

EXAMPLES = (
    "catseg-fast tune",
    "catseg-fast tune --op window_block --op decode --dtype bf16 --minutes 5",
    "catseg-fast tune --classes 20 --classes 150 --crops 1 --output configs",
)


def tune(
    op: Annotated[
        list[str] | None, choice("--op", TUNABLE_OPS, "Op to tune, repeatable; by default all of")
    ] = None,
    dtype: Annotated[str, choice("--dtype", tuple(DTYPES), "Type of the tensors")] = "fp16",
    classes: Annotated[
        list[int],
        typer.Option(
            metavar="N",
            min=1,
            help="Size of a vocabulary, repeatable. Steps have at most 256 / crops classes; vocabularies "
            "that differ only in the number of steps count once.",
        ),
    ] = [150, 1203],  # noqa: B006
    crops: Annotated[
        int, typer.Option(metavar="N", min=1, help="Crops of a picture: 5 with a sliding window, 1 without.")
    ] = 5,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", callback=check_folder,
            help="Folder of GPU/OP.json; by default the one that kernels use: ~/.cache/catseg-fast/configs.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="M", min=0, callback=no_nan, help="Stop after this time; keep finished kernels."
        ),
    ] = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Time the Triton kernels' launch configs on this machine's GPU, and use the fastest from now on.

    Of each op's candidates, the fastest with the same results as the default is kept. Nothing else should run
    on the GPU meanwhile. Results are added to the folder kernel by kernel, so that the command can be
    interrupted at any time.
    """
    with plain_errors(debug):
        import torch

        device = _require_gpu()

        from catseg_fast.engine import tuner

        tunables = tuner.list_tunables(
            op or TUNABLE_OPS, getattr(torch, DTYPES[dtype]), classes, crops, device
        )
        folder, gpu = output or _default_folder(), torch.cuda.get_device_name(device)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        outcomes: list[Outcome] = []
        seconds = math.inf if minutes is None else 60 * minutes
        with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            task = progress.add_task("Tuning", total=sum(len(tunable.candidates) for tunable in tunables))
            for outcome in tuner.tune_all(
                tunables, device, gpu, folder, timer=tuner.median_milliseconds, seconds=seconds,
                advance=lambda: progress.advance(task),
            ):  # fmt: skip
                _report_faults(outcome)
                outcomes.append(outcome)
    stdout.print_table(results_table(outcomes))
    if any(outcome.reason is None and outcome.unsaved is None for outcome in outcomes):
        stdout.print(f"{gpu}: written to {folder}")
    if len(outcomes) < len(tunables):
        stderr.print(f"time is up: {len(outcomes)} of {len(tunables)} kernels and shapes are done")
    if any(outcome.reason or outcome.unsaved for outcome in outcomes):
        raise typer.Exit(1)


def _default_folder() -> Path:
    from catseg_fast.kernels.launch.config_files import user_folder

    try:
        return user_folder()
    except RuntimeError as error:
        raise RunError(f"tune: {error} Name a folder with --output, or set XDG_CACHE_HOME.") from None


def _require_gpu() -> torch.device:
    """Return the current GPU.

    Raises:
        RunError: if there is no GPU on which kernels can be timed; the message says what was found.
    """
    import torch

    from catseg_fast.backend import why_no_triton

    if not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise RunError(
            f"tune: needs a CUDA GPU, to time kernels on; found none, with torch {torch.__version__} {build}"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := why_no_triton(device):
        raise RunError(f"tune: needs a CUDA GPU that the Triton kernels run on; {reason}")
    from catseg_fast.kernels.launch.checks import INTERPRETED

    if INTERPRETED:
        raise RunError("tune: TRITON_INTERPRET is set; the interpreter's times say nothing about the GPU")
    return device


def _report_faults(outcome: Outcome) -> None:
    problem = outcome.tunable.problem
    if outcome.reason is not None:
        say_error(f"{problem.op}, {problem.kernel} {_shape(problem)}: {outcome.reason}")
    if outcome.unsaved is not None:
        say_error(f"{problem.op}, {problem.kernel} {_shape(problem)}: {outcome.unsaved}")
    for config in outcome.wrong:
        say_note(
            f"{problem.op}, {problem.kernel} {_shape(problem)}: discarded, as its result is not the "
            f"default's: {config}"
        )


def results_table(outcomes: list[Outcome]) -> Table:
    """Return a table with one row per kernel and shape: times, speedup, and numbers of candidates."""
    table = Table("op", "kernel", "shape", "default", "best", "gain", "timed", "failed", "wrong")
    for outcome in outcomes:
        problem = outcome.tunable.problem
        times = ("-", "-", "-")
        if outcome.reason is None:
            default, best = outcome.default_milliseconds, outcome.milliseconds[outcome.best]
            times = (f"{default:.3f} ms", f"{best:.3f} ms", f"{default / best:.2f}x")
        counts = map(str, (len(outcome.milliseconds), outcome.failed, len(outcome.wrong)))
        table.add_row(problem.op, problem.kernel, _shape(problem), *times, *counts)
    return table


def _shape(problem: Any) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in problem.sizes)
    precision = "" if problem.dtype != "fp32" else f" {problem.precision}"
    return f"{problem.dtype}{precision}, crops x classes {problem.crop_classes}, {sizes}"
