"""Rules of the tree: import contracts (`[tool.importlinter]` in pyproject.toml), and the files of tests."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UPWARD = "Rooms import downward, from the commands to the kernels"
OPS = "Ops do not import each other"
CIRCLES = "No circles in a room"


def lint_imports(root: Path) -> tuple[int, str]:
    """Check the contracts of a tree; return the exit code and the report."""
    pytest.importorskip("importlinter", reason="import-linter is not installed (it needs Python 3.11)")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package's modules."""
    for folder in ("catseg_fast", "kernels", "reference"):
        kept = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json", "static")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=kept)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_are_kept() -> None:
    code, printed = lint_imports(ROOT)
    assert code == 0, printed


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("kernels/layer_norm.py", "from catseg_fast.engine.folding import Plan", UPWARD),
        ("kernels/launch/config.py", "import catseg_fast.files", UPWARD),
        ("kernels/decoder/plain.py", "def late(): from catseg_fast.reference.upsample import Up", UPWARD),
        ("catseg_fast/engine/folding.py", "from catseg_fast.model import CATSeg", UPWARD),
        ("catseg_fast/inference/graphs.py", "from catseg_fast.model import CATSeg", UPWARD),
        ("kernels/decoder/op.py", "from catseg_fast.kernels.cost_volume import plain", OPS),
        ("catseg_fast/engine/fourier.py", "from catseg_fast.engine import streaming", CIRCLES),
    ],
)
def test_a_planted_import_is_found(tree: Path, module: str, line: str, contract: str) -> None:
    with (tree / module).open("a") as file:
        file.write(f"\n{line}\n")
    code, printed = lint_imports(tree)
    assert code != 0
    assert f"{contract} BROKEN" in printed, printed


def test_a_module_without_a_layer_is_found(tree: Path) -> None:
    (tree / "catseg_fast" / "utils.py").touch()
    code, printed = lint_imports(tree)
    assert code != 0
    assert "utils" in printed, printed


# Kernels import nothing of the package, and refuse arguments as torch's functions do. The readers of a
# checkpoint's parts raise reasons that `read_checkpoint` completes with the file's path.
READERS = ("checkpoints/stand_ins.py", "checkpoints/torch_file.py", "checkpoints/unpickle.py")


def test_errors_of_users_are_the_packages_own() -> None:
    """A bare ValueError on the command line is reported as a bug."""
    package = ROOT / "catseg_fast"
    paths = [path for folder in (package, *package.glob("*/")) for path in folder.rglob("*.py")]
    raised = re.compile(r"raise (ValueError|TypeError|RuntimeError)\(")
    found = {path.relative_to(package).as_posix() for path in paths if raised.search(path.read_text("utf-8"))}
    assert {name for name in found if not name.startswith("kernels/")} <= set(READERS)
    assert len(found) > len(READERS), "the links to folders are followed"


TESTS = ROOT / "tests"
TEST_FILES = sorted(TESTS.glob("test_*.py"))


def imports(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, at any level."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_module_is_imported() -> None:
    modules = {path.stem for path in TEST_FILES}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in TESTS.rglob("*.py")
        for name in imports(path)
        if not modules.isdisjoint(name.split("."))
    ]
    assert not found, "helpers that several test modules use belong in tests/support/"


MOST_LINES = 400


def test_files_are_short() -> None:
    for path in TESTS.rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES, f"{path.relative_to(ROOT)}: {lines} lines"


# Calls that raise where a test fails.
CHECKS = re.compile(r"assert|check|(raises|warns|fail|opcheck)$")


def has_check(function: ast.AST, helpers: dict[str, ast.AST]) -> bool:
    """Check whether a test asserts something, itself or in a helper of its module."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if CHECKS.match(name):
                return True
            if name in helpers:
                others = {key: value for key, value in helpers.items() if key != name}
                if has_check(helpers[name], others):
                    return True
    return False


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_every_test_asserts_something(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name, function in functions.items():
        if name.startswith("test_"):
            assert has_check(function, {**functions, name: ast.Pass()}), f"{path.name}: {name}"


CLAUSE = re.compile(r"(What|Whether|How|Which|Where|When|Why|If|As|So that)\b")


@pytest.mark.parametrize("folder", ["catseg_fast", "kernels", "reference", "bench"])
def test_docstrings_begin_with_one_sentence(folder: str) -> None:
    """The first line is a noun phrase or an imperative, on one line, with a full stop."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first = (ast.get_docstring(node) or ".").splitlines()[0]
                if CLAUSE.match(first) or not first.endswith((".", ":")):
                    found.append(f"{path.relative_to(ROOT)}: {first}")
    assert not found, "\n".join(found)
