"""Options of the benchmarks, the fixture that measures one, and the tables at the end.

--full          every case at its published size, which is the default on a GPU
--records FILE  add a line of JSON per benchmark as it ends; benchmarks that are in the file are skipped
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from rich.table import Table

from bench import records
from bench.baselines import BASELINES
from bench.cases import aggregator_cases, scaling_cases
from bench.measure import THREADS, device_name
from bench.meter import Meter
from catseg_fast.engine.precision import tf32

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmark every case at its published size")
    parser.addoption("--records", type=Path, metavar="FILE", help="where a line for each benchmark goes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a benchmark that takes minutes on a CPU; runs with --full")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = _full(metafunc.config)
    choices = {
        "aggregator_case": aggregator_cases(full),
        "scaling_case": scaling_cases(full, gpu=DEVICE.type == "cuda"),
        "baseline": BASELINES,
    }
    for name, values in choices.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=lambda value: getattr(value, "name", None) or str(value))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--records")
    known = {record.id for record in records.read([path])} if path and path.exists() else set()
    for item in items:
        if item.nodeid in known:
            item.add_marker(pytest.mark.skip(reason="is in the file of records"))
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: runs with --full"))


@pytest.fixture(autouse=True)
def _same_conditions() -> Iterator[None]:
    torch.set_num_threads(THREADS)
    with tf32(False):
        yield
    torch.compiler.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> torch.device:
    """Device of the benchmarks."""
    return DEVICE


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """True if cases have their published sizes."""
    return _full(request.config)


@pytest.fixture
def table() -> Callable[..., None]:
    """Add a row to the table of a title: `table(title, {column: value, …})`."""
    return _add_row


@pytest.fixture
def meter(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Meter:
    """Function that measures a call, records it and adds it to the tables."""
    return Meter(request.node.nodeid, benchmark, DEVICE, request.config.getoption("--records"), _add_row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _tables:
        return
    terminalreporter.section("tables")
    console = Console(width=180)
    for title, (columns, rows) in _tables.items():
        rendered = Table(*columns, title=f"{title} (torch {torch.__version__}, {device_name(DEVICE)})")
        for row in rows:
            rendered.add_row(*row)
        with console.capture() as capture:
            console.print(rendered)
        terminalreporter.write(capture.get() + "\n")


def _add_row(title: str, row: dict[str, Any]) -> None:
    _, rows = _tables.setdefault(title, (tuple(row), []))
    rows.append(tuple(map(str, row.values())))


def _full(config: pytest.Config) -> bool:
    return config.getoption("--full") or DEVICE.type == "cuda"
