"""What the commands of the command line share: consoles, options, and errors in one line. Without torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from catseg_fast.errors import CATSegError

# Errors that a user can cause and fix: their message is enough. Any other is a bug, or memory has run out.
USER_ERRORS = (CATSegError, OSError)

stdout, stderr = Console(), Console(stderr=True)


def examples(*lines: str) -> str:
    """An epilog of one example command a line."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in lines)


def choice(flag: str, choices: Sequence[str], text: str) -> Any:
    """An option that takes one of `choices`, or several where its type is a list."""

    def check(value: str | list[str] | None) -> str | list[str] | None:
        for name in [value] if isinstance(value, str) else value or []:
            if name not in choices:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(choices)}")
        return value

    return typer.Option(flag, callback=check, metavar="NAME", help=f"{text}: {', '.join(choices)}.")


def check_folder(path: Path | None) -> Path | None:
    """An option's callback: what is there already must be a folder."""
    if path is not None and path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{path} is not a folder")
    return path


def output_folder(text: str) -> Any:
    """The option --output, a folder that is made if need be."""
    return typer.Option("--output", "-o", metavar="DIR", callback=check_folder, help=text)


def say_error(message: object) -> None:
    stderr.print(Text.assemble(("error:", "bold red"), " ", str(message)), soft_wrap=True)


def describe(error: Exception) -> str:
    """Return the message of an error; for a bug, with the request to report it."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch is not imported
        return str(error) if "out of memory" in str(error) else f"out of memory: {error}".removesuffix(": ")
    return (
        f"{type(error).__name__}: {error}\nThis is a bug in catseg-fast. Please report it with the output of "
        "the same command with --debug, and of `catseg-fast env`."
    )


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Turn errors of the user's making into a message and exit code 1, an interrupt into 130."""
    try:
        yield
    except USER_ERRORS as error:
        if debug:
            raise
        say_error(error)
        raise typer.Exit(1) from None
    except Exception as error:
        if debug or isinstance(error, click.exceptions.ClickException | click.exceptions.Exit):
            raise
        say_error(describe(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stderr.print("interrupted; the results written so far are complete")
        raise typer.Exit(130) from None


@contextmanager
def image_progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the speed and the time left; yields what is called with the images done and of all."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    hidden = stderr.quiet or not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(text, total=None, rate="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if speed := bar.tasks[0].speed:
                bar.update(task, rate=f"{speed:.2f} img/s")

        yield advance


@contextmanager
def late_progress(text: str, after: float = 2.0) -> Iterator[Callable[[int, int], None]]:
    """A bar that appears only if the work takes longer than `after` seconds; yields a function of the number
    of steps done and of all.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
    task, begin = bar.add_task(text, total=None), time.monotonic()

    def advance(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if not bar.live.is_started and time.monotonic() - begin > after:
            with suppress(LiveError):  # rich before 14.1 shows one bar at a time
                bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
