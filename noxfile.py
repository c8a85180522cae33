"""The daily commands: `nox -l` lists them, `nox -s tests -- -k golden` passes arguments on."""

from __future__ import annotations

import shutil
from pathlib import Path
from zipfile import ZipFile

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_venv = "yes"  # each one holds a torch of several GB

# Where the modules of each folder are installed; the same as in setup.py.
FOLDERS = {
    "catseg_fast": "catseg_fast",
    "kernels": "catseg_fast/kernels",
    "reference": "catseg_fast/reference",
}


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite."""
    session.install("-e", ".[test]")
    session.run("pytest", "-n", "2", "--dist", "loadgroup", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: lint and format; import-linter: what may import what."""
    session.install("ruff==0.17.*", "import-linter>=2.17")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("lint-imports", env={"PYTHONPATH": "."})


@nox.session
def types(session: nox.Session) -> None:
    """Mypy over the package and the benchmarks."""
    session.install("-e", ".[bench]", "mypy>=1.15")
    session.run("mypy", "-p", "catseg_fast", "-p", "bench", *session.posargs)


@nox.session(name="old-triton")
def old_triton(session: nox.Session) -> None:
    """The test suite with the oldest Triton that the kernels are kept working on.

    Its interpreter, other than its compiler, does not work with numpy 2.4.
    """
    session.install("-e", ".[test]", "torch==2.11.*", "triton==3.6.*", "numpy<2.4")
    session.run("pytest", "-n", "2", "--dist", "loadgroup", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks."""
    session.install("-e", ".[bench]")
    session.run("pytest", "bench", "--benchmark-only", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation's site, in site/; a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Source archive and wheel in dist/; the wheel must hold the tree's modules and no other package."""
    session.install("build>=1.2")
    for leftover in ("build", "dist"):
        shutil.rmtree(leftover, ignore_errors=True)
    session.run("python", "-m", "build", silent=True)
    (wheel,) = Path("dist").glob("*.whl")
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{target}/{path.relative_to(folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in Path(folder).rglob("*")
        if path.suffix in (".py", ".json", ".js", ".css", ".safetensors") or path.name == "py.typed"
    }
    if packed != expected:
        session.error(
            f"{wheel} lacks {sorted(expected - packed)} and should not have {sorted(packed - expected)}"
        )
    session.log(f"{wheel} holds {len(packed)} files of catseg_fast and nothing else")
