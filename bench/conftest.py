"""Tables after the benchmarks; a benchmark adds its rows with the `table` fixture."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

# Threads of the CPU benchmarks; the figures in the documentation are for two.
THREADS = min(2, os.cpu_count() or 1)

_tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {}


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture
def table() -> Callable[..., None]:
    """Add a row to the table of a title: `table(title, {column: value, …})`."""

    def add(title: str, row: dict[str, Any]) -> None:
        _, rows = _tables.setdefault(title, (tuple(row), []))
        rows.append(tuple(map(str, row.values())))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _tables:
        return
    terminalreporter.section("tables")
    console = Console(width=120)
    for title, (columns, rows) in _tables.items():
        rendered = Table(*columns, title=f"{title} (torch {torch.__version__}, {THREADS} CPU threads)")
        for row in rows:
            rendered.add_row(*row)
        with console.capture() as capture:
            console.print(rendered)
        terminalreporter.write(capture.get() + "\n")
