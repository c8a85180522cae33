"""Code shared by all commands, without torch: consoles, options, and errors in one line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.errors import LiveError
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from catseg_fast.errors import CATSegError

# Errors that a user can cause and fix: their message is enough. Any other is a bug, or memory has run out.
USER_ERRORS = (CATSegError, OSError)

# How a command ends by design: some versions of typer bring a click of their own.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
_ENDS = (typer.Exit, typer.Abort, USAGE_ERROR)

# Of the characters that change the direction of a line, those that last beyond it are among them.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNLIMITED = 2**20  # columns
_KEPT_NAME = 50  # characters of a name that no table breaks


def printable(text: str) -> str:
    """Return a text with escapes in place of control characters, and of bytes that are not UTF-8.

    Python represents such bytes of file names and arguments by lone surrogates, which cannot be printed.
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class PlainConsole(Console):
    """A console that prints text as it is: brackets and colons are not markup, and lines are not broken."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def print_table(self, table: Table, names: Sequence[int] = (), paths: Sequence[int] = ()) -> None:
        """Print a table of which nothing is cut.

        In a pipe each row is one line. On a terminal that is too narrow, cells are broken between words.

        Args:
            table: of strings.
            names: columns of names, broken only if they are long.
            paths: columns of which no cell is broken.
        """
        for column in table.columns:
            column.overflow = "fold"
        for index in (*names, *paths):
            cells = table.columns[index].cells
            longest = max((cell_len(printable(str(cell))) for cell in cells), default=0)
            if index in paths or longest <= _KEPT_NAME:
                table.columns[index].no_wrap, table.columns[index].min_width = True, longest
        needed, natural = Measurement.get(self, self.options.update(width=_UNLIMITED), table)
        width = max(needed, min(natural, self.width)) if self.is_terminal else natural
        wide = type(self)(file=self.file, force_terminal=self.is_terminal, width=width)
        wide.print(table, soft_wrap=False)


stdout, stderr = PlainConsole(), PlainConsole(stderr=True)


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
    """Check, as an option's callback, that the path is a folder if it exists."""
    # `Path.exists` fails for names that are too long.
    if path is not None and os.path.exists(path) and not os.path.isdir(path):
        raise typer.BadParameter(f"{path} is not a folder")
    return path


def output_folder(text: str) -> Any:
    """The option --output, a folder that is made if need be."""
    return typer.Option("--output", "-o", metavar="DIR", callback=check_folder, help=text)


def say_error(message: object) -> None:
    _say("error:", "bold red", str(message))


def say_warning(message: object) -> None:
    _say("warning:", "bold yellow", str(message))


def say_note(message: object) -> None:
    _say("note:", "yellow", str(message))


def _say(kind: str, style: str, message: str) -> None:
    stderr.print(Text.assemble((kind, style), " ", printable(message)))


def show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print a warning as one line; a replacement for `warnings.showwarning`."""
    say_warning(message)


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
        if debug or isinstance(error, _ENDS):
            raise
        say_error(describe(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stderr.print("interrupted; the results written so far are complete")
        raise typer.Exit(130) from None


@contextmanager
def image_progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the speed and the time left; yield a function of the images done and the total."""
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
    """Show a bar if the work takes longer than `after` seconds.

    Yields:
        A function of the number of steps done and the total.
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


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Yield what is called at the start of each stage of long work, with its name.

    The stage and its time so far are shown on a terminal; elsewhere there is a line for each stage.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def begin(name: str) -> None:
            bar.reset(task, description=f"{name} …")
            if not stderr.is_terminal:
                stderr.print(f"{name} …")

        yield begin


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
