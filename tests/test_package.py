"""The package as installed: its names, its console script, its type marker."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import distribution, entry_points
from importlib.resources import files
from pathlib import Path
from zipfile import ZipFile

import pytest

import catseg_fast


def run_isolated(code: str, folder: Path) -> str:
    """Return the output of `code` in a Python process that does not see the working directory."""
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_version() -> None:
    assert distribution("catseg-fast").version == catseg_fast.__version__


def test_public_names() -> None:
    assert all(hasattr(catseg_fast, name) for name in catseg_fast.__all__)


@pytest.mark.parametrize("name", ["catseg_fast.kernels", "catseg_fast.reference"])
def test_folders_of_the_checkout_are_subpackages(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_nothing_else_is_installed_at_top_level() -> None:
    names = distribution("catseg-fast").read_text("top_level.txt")
    assert names is not None
    assert names.split() == ["catseg_fast"]


def test_imports_from_anywhere(tmp_path: Path) -> None:
    code = "import catseg_fast, catseg_fast.reference as r; print(catseg_fast.__version__, r.__name__)"
    assert run_isolated(code, tmp_path) == f"{catseg_fast.__version__} catseg_fast.reference"


def test_imports_without_triton(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; import catseg_fast.cli.main, catseg_fast.model as m"
    assert run_isolated(f"{code}; print(m.CATSeg.__name__)", tmp_path) == "CATSeg"


def test_is_typed() -> None:
    assert files("catseg_fast").joinpath("py.typed").is_file()


def test_console_script() -> None:
    (script,) = entry_points(group="console_scripts", name="catseg-fast")
    assert script.value == "catseg_fast.cli.main:main"
    assert callable(script.load())


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, catseg_fast.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wheel_and_source_archive_have_every_file(tmp_path: Path) -> None:
    """Tuned launch configs, class lists, the page and the bundled weights, too."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    root = Path(__file__).parent.parent
    for name in ("catseg_fast", "kernels", "reference"):
        shutil.copytree(
            root / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (wheel,), (archive,) = ((tmp_path / "dist").glob(name) for name in ("*.whl", "*.tar.gz"))
    in_wheel = set(ZipFile(wheel).namelist())
    with tarfile.open(archive) as source:
        in_source = {name.partition("/")[2] for name in source.getnames()}
    data = {
        path.relative_to(root).as_posix()
        for path in (root / "catseg_fast").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert any(name.startswith("catseg_fast/configs/nvidia-h200/") for name in data)
    assert data - in_wheel == data - in_source == set()
