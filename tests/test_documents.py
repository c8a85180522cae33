"""Every code block of README and docs/ runs as printed, top to bottom, in a folder with the files it names.

Commands that take too long are shortened by options at their end. Commands that need a GPU, a server or other
processes only parse their arguments: other tests run them at another size.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from importlib.metadata import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import typer
from typer.testing import CliRunner

import catseg_fast
from catseg_fast import VARIANTS
from catseg_fast.checkpoints import hub
from catseg_fast.cli.main import app
from catseg_fast.text import class_lists
from support.documents import DOCUMENTS, ROOT, SMALL, TINY, blocks, calls, make_checkout

# Options that make a command fast enough; of an option that is given twice, the last one counts.
SHORT = {
    "segment": ["--device", "cpu", "--whole"],
    "scenes": ["--count", "2"],
    "train": ["--steps", "1", "--batch-size", "1"],
    "eval": ["--limit", "1", "--whole"],
    "warmup": ["--device", "cpu", "--whole"],
}
READ_ALONE = ("app", "tune", "export")
# The way into a checkout; README's two commands are CI's.
NOT_HERE = (".", "cd", "git", "pre-commit", "python3")
FEW = 4  # classes of each ready list
SHORT_CODE = {"range(100)": f"range({FEW})"}  # of Python


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents name."""
    folder = tmp_path_factory.mktemp("checkout")
    make_checkout(folder)
    return folder


@pytest.fixture
def checkout(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which blocks run, with a tiny model's weights in place of upstream's."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda *_: tmp_path / "model_base.pth")
    monkeypatch.setitem(hub.BUNDLED, "demo", tmp_path / "model_base.pth")
    for name in ("v2-vitl", "v2-vitb"):
        monkeypatch.setitem(VARIANTS, name, TINY)
    whole_list = class_lists.ready_list

    def short_list(name: str) -> class_lists.ReadyList:
        ready = whole_list(name)
        return replace(ready, classes=list(ready.classes)[:FEW])

    for module in (catseg_fast, class_lists):
        monkeypatch.setattr(module, "ready_list", short_list)
    return tmp_path


def run_command(words: list[str]) -> None:
    command, *arguments = words
    if command in READ_ALONE:
        read_command(words)
        return
    result = CliRunner().invoke(app, [command, *arguments, *SHORT.get(command, [])])
    assert result.exit_code == 0, f"catseg-fast {' '.join(words)}: {result.output}"


def read_command(words: list[str]) -> None:
    typer.main.get_group(app).commands[words[0]].make_context(words[0], words[1:]).close()


def run_torchrun(words: list[str]) -> None:
    script = words.index("-m")
    assert words[script + 1] == "catseg_fast"
    read_command(words[script + 2 :])


def run_module(words: list[str]) -> None:
    flag, name, *arguments = words
    assert flag == "-m"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        patch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_module(name, run_name="__main__")
    text = output.getvalue()
    for option in (word for word in arguments if word.startswith("--")):
        assert re.search(rf"{option}\b", text), f"{name} has no option {option}"


def collect(words: list[str]) -> None:
    """Check that pytest accepts the arguments and finds tests, which run elsewhere."""
    if words[0] == "-n":  # the whole test suite, which is what CI runs
        return
    call = [sys.executable, "-m", "pytest", *words, "--collect-only", "-q", "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(call, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def check_extras(words: list[str]) -> None:
    extras = metadata("catseg-fast").get_all("Provides-Extra")
    asked = re.findall(r"\[(.+)\]", words[-1])
    assert words[0] == "install"
    assert {name for names in asked for name in names.split(",")} <= set(extras)


def check_session(words: list[str]) -> None:
    assert words[0] == "-s"
    assert f"def {words[1].replace('-', '_')}(session" in (ROOT / "noxfile.py").read_text()


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "catseg-fast": run_command,
    "torchrun": run_torchrun,
    "python": run_module,
    "pytest": collect,
    "pip": check_extras,
    "nox": check_session,
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_runs(document: Path, checkout: Path) -> None:
    names: dict[str, object] = {}
    for language, code in blocks(document):
        if language == "python":
            for long, short in SHORT_CODE.items():
                code = code.replace(long, short)
            exec(compile(code, str(document), "exec"), names)
            continue
        if language == "text":  # what is printed
            continue
        assert language == "bash", f"{document}: a block of {language} is not run"
        for program, *words in calls(code):
            if program not in NOT_HERE:
                PROGRAMS[Path(program).name](words)


@pytest.mark.slow
def test_readmes_python_runs_as_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code runs in a checkout, with only its own files."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {}
    for language, code in blocks(ROOT / "README.md"):
        if language == "python":
            exec(compile(code, "README.md", "exec"), names)
    assert names["segmentation"].top_labels.shape == (3, 480, 640)


def test_one_rank_of_a_class_parallel_job(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Callable[..., object]] = {}
    (code,) = (
        code for _, code in blocks(ROOT / "docs/class_parallel.md") if "def segment_on_this_rank" in code
    )
    exec(compile(code, "class_parallel.md", "exec"), names)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    try:
        segmentation = names["segment_on_this_rank"]("photo.jpg", ["sky", "tree"])
    finally:
        with suppress(ValueError, AssertionError):
            dist.destroy_process_group()
    assert segmentation.labels.shape == SMALL[::-1]


def test_links_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            if not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert broken == []


def test_links_within_the_site_stay_there() -> None:
    """The site holds only files of docs/."""
    docs = ROOT / "docs"
    targets = {
        document.parent / target
        for document in DOCUMENTS[1:]
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    }
    assert len(targets) > 10
    assert all(Path(os.path.normpath(target)).is_relative_to(docs) for target in targets)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "WARNING -" not in result.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in (
        "catseg_fast.CATSeg.segment",
        "catseg_fast.engine.Engine",
        "catseg_fast.ray.segment_dataset",
    ):
        assert f'id="{name}"' in api
