"""README's two commands, and its pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from catseg_fast.cli.main import app
from catseg_fast.data.scenes import draw_scene
from catseg_fast.data.scenes.words import HELD_OUT
from support.documents import README, ROOT, SCENE, STREET, blocks, calls

EXAMPLE = (7, 10)  # of the generator of README's picture
SHELL = [code.strip() for language, code in blocks(README) if language == "bash"]
COMMANDS = [code for code in SHELL if code.startswith("python3 -m venv ")]


def test_there_are_two_commands_of_one_line_each() -> None:
    assert [(code.count("\n"), code.count("&&")) for code in COMMANDS] == [(0, 2), (0, 2)]
    assert "catseg-fast segment examples/scene.jpg" in COMMANDS[0]
    assert ".venv/bin/pytest" in COMMANDS[1]


def test_ci_runs_the_test_command_as_printed() -> None:
    assert COMMANDS[1] in [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]


def test_the_first_command_finds_what_is_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled weights label most pixels of README's picture correctly."""
    monkeypatch.chdir(ROOT)
    arguments = calls(COMMANDS[0])[-1][1:]
    arguments[arguments.index("--output") + 1] = str(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    scene = draw_scene(np.random.default_rng(EXAMPLE), HELD_OUT, size=(480, 640))
    with Image.open(SCENE) as picture, Image.open(tmp_path / "scene.labels.png") as labels:
        assert np.abs(np.asarray(picture, float) - scene.image).mean() < 4  # of JPEG
        found = np.asarray(labels)
    names = [thing if isinstance(thing, str) else thing.name for thing in scene.things]
    classes = arguments[arguments.index("--classes") + 1].split("; ")
    expected = np.array([classes.index(name) for name in names])[scene.labels]
    assert (found == expected).mean() > 0.9
    for index in range(len(classes)):
        both = ((found == index) & (expected == index)).sum()
        assert both > 0.5 * ((found == index) | (expected == index)).sum(), classes[index]


def test_the_example_is_what_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw_scene", ROOT / "examples" / "draw_scene.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn, kept = (np.asarray(image, dtype=float) for image in (module.draw_scene(), Image.open(STREET)))
    assert drawn.shape == kept.shape == (448, 640, 3)
    assert np.abs(drawn - kept).mean() < 1  # versions of Pillow differ at the edges of shapes
    assert STREET.stat().st_size < 200_000
