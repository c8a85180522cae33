"""`.ci/run`, with stand-ins for the slow parts: no environment is made and nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "run"
CLOSING = "===== 2 passed, 1 skipped in 3.45s ====="

# Makes an "environment" of a pip that shows its arguments and a pytest that exits with $CODE.
PYTHON = f"""#!/bin/sh
[ "$1" = --version ] && echo Python && exit
mkdir -p .venv/bin
printf '%s\\n' '#!/bin/sh' 'echo "pip $*"' 'exit $PIP_CODE' > .venv/bin/pip
printf '%s\\n' '#!/bin/sh' 'echo "{CLOSING}"' 'echo a warning >&2' 'exit $CODE' > .venv/bin/pytest
chmod +x .venv/bin/*
"""


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script in a tree of its own under `folder`, without a terminal, as CI runs it."""
    (folder / "tree" / ".ci").mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "tree" / ".ci" / "run")
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text(PYTHON)
    (folder / "bin" / "python3").chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "tree/.ci/run"],
        cwd=folder,
        env={**os.environ, "CI": "true", "PATH": path, "TMPDIR": str(folder), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("code", [0, 1, 5])
def test_exits_with_pytests_code_and_closes_with_its_line(code: int, tmp_path: Path) -> None:
    done = run(tmp_path, PIP_CODE="0", CODE=str(code))
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == CLOSING
    assert "pip install -e .[test]" in done.stdout


def test_stops_when_the_installation_fails(tmp_path: Path) -> None:
    done = run(tmp_path, PIP_CODE="3", CODE="0")
    assert done.returncode == 3
    assert CLOSING not in done.stdout


def test_leaves_nothing_behind(tmp_path: Path) -> None:
    run(tmp_path, PIP_CODE="0", CODE="0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "tree"]
    assert [path.name for path in (tmp_path / "tree").iterdir()] == [".ci"]
