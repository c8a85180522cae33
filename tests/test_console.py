"""Output of the command line: unchanged text, uncut tables, errors in plain lines."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

from catseg_fast.cli.main import app
from catseg_fast.console import PlainConsole, printable, say_note, say_warning, show_warning

TEXTS = (
    "/tmp/out[/b]",
    "a[red]b",
    "[bold]x[/]",
    ":smile:",
    "[link=https://x.y]z[/link]",
    r"\[x]",
    "100% 'x' 1",
)


def console(width: int = 80, terminal: bool = False) -> tuple[PlainConsole, io.StringIO]:
    file = io.StringIO()
    return PlainConsole(file=file, width=width, force_terminal=terminal, color_system=None), file


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_printed_as_it_is(text: str) -> None:
    plain, file = console(width=10)
    plain.print(text)
    plain.print_table(make_table([text, text]))
    first, *table = file.getvalue().splitlines()
    assert first == text
    assert any(line.split("│")[1:3] == [f" {text:<8} "] * 2 for line in table)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("caf\udce9.png", r"caf\xe9.png"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\ud800\x9b1m", r"\ud800\x9b1m"),
        ("line\nnext\ttab", "line\nnext\ttab"),
        ("sea\u202eeert.png \u2066", r"sea\u202eeert.png \u2066"),
        ("two\u2028lines", r"two\u2028lines"),
        ("ע\u200fב", "ע\u200fב"),
        ("天空 ẅ 👩\u200d🚀 \u3000", "天空 ẅ 👩\u200d🚀 \u3000"),
    ],
)
def test_what_cannot_be_printed_is_escaped(
    text: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable(text) == printed
    plain, file = console()
    plain.print(text)
    assert file.getvalue() == printed.replace("\ttab", "    tab") + "\n"
    say_note(text)
    say_warning(text)
    assert capsys.readouterr().err.count(printed.replace("\ttab", "    tab")) == 2


def make_table(row: list[str]) -> Table:
    table = Table(*(f"column {index}" for index in range(len(row))), title="t")
    table.add_row(*row)
    table.add_row(*("x" for _ in row))
    return table


LONG_NAME = "the quick brown fox jumps over the lazy dog by the river"
LONG_PATH = "/data/a folder/" + "/".join("abcdefgh" for _ in range(12)) + "/x.overlay.png"


@pytest.mark.parametrize("width", [20, 80, 200])
def test_in_a_pipe_each_row_is_a_line(width: int) -> None:
    plain, file = console(width)
    plain.print_table(make_table([LONG_PATH, LONG_NAME * 20, "7"]))
    (line,) = [line for line in file.getvalue().splitlines() if LONG_PATH in line]
    assert LONG_NAME * 20 in line
    assert "…" not in file.getvalue()


@pytest.mark.parametrize("width", [20, 80, 200])
def test_on_a_terminal_paths_and_names_are_whole(width: int) -> None:
    plain, file = console(width, terminal=True)
    words = " ".join(f"word{index}" for index in range(60))
    plain.print_table(make_table([LONG_PATH, LONG_NAME[:44], words]), paths=(0,), names=(1,))
    text = file.getvalue()
    assert LONG_PATH in text
    assert LONG_NAME[:44] in text
    assert "…" not in text
    assert all(f"word{index}" in text for index in range(60))


def test_variants_are_whole_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["variants"])
    for name in ("v1-vitl-swinb", "model_final_large.pth", "in this package", "12 layers of 768, patch 16"):
        assert name in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "x.png", "--classes-file", "/nowhere/" + "very-long-name/" * 12 + "[b]classes.txt"],
        ["segment", "x.png", "--output", __file__],
        ["segment", "x.png", "--stats", "/nowhere/" + "very-long-name/" * 12 + "s.csv"],
        ["eval", "--data", "x", "--backend", "[/x]" * 30],
    ],
)
def test_usage_errors_do_not_break_paths(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert arguments[-1] in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_how_commands_end() -> None:
    for arguments, code in (
        (["--version"], 0),
        (["--help"], 0),
        ([], 2),
        (["nothing"], 2),
        (["variants"], 0),
    ):
        assert CliRunner().invoke(app, arguments).exit_code == code, arguments
    assert "Usage" in CliRunner().invoke(app, []).output


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", show_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show_warning
        warnings.warn("of [b] two", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: of [b] two\n"


@pytest.mark.parametrize("width", [60, 100])
def test_paragraphs_of_help_are_filled(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = CliRunner().invoke(app, ["segment", "--help"]).stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(" Writes for each picture"))
    end = next(index for index in range(start, len(lines)) if not lines[index].strip())
    for line, following in zip(lines[start : end - 1], lines[start + 1 : end], strict=True):
        assert len(line.rstrip()) + 1 + len(following.split()[0]) > width - 2  # no other word fits


def test_help_has_no_markup_eaten() -> None:
    """Every word in brackets in a command's help is shown."""
    import catseg_fast.cli

    for path in Path(catseg_fast.cli.__file__).parent.glob("*.py"):
        extras = re.findall(r"catseg-fast\\?(\[\w+\])", path.read_text(encoding="utf-8"))
        if path.stem == "export":
            assert extras
            text = CliRunner().invoke(app, ["export", "--help"]).output
            assert "catseg-fast[export]" in text.replace("\n", "")


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff\xfe[red].png", b"a[/b]\x1b[31m.png"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_file_name_can_be_told(name: bytes, encoding: str, tmp_path: Path) -> None:
    """The error shows a name that is not UTF-8, or holds markup or control characters."""
    path = os.fsencode(tmp_path) + b"/" + name
    command = [sys.executable, "-m", "catseg_fast", "segment", path]
    env = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "40"}
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    assert done.returncode == 1
    shown = printable(os.fsdecode(path))
    assert b"Traceback" not in done.stderr
    assert (repr(os.fsdecode(path)) in done.stderr.decode()) or (shown in done.stderr.decode())
