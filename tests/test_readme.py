"""README's commands and code, run as printed where that is cheap."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from catseg_fast import VARIANTS, CATSeg, reference
from catseg_fast.cli import app
from catseg_fast.config import CLIPConfig
from catseg_fast.scenes import draw_scene
from catseg_fast.scenes.words import HELD_OUT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
STREET = ROOT / "examples" / "street.png"
SCENE, EXAMPLE = ROOT / "examples" / "scene.jpg", (7, 10)  # and what its generator starts from
TINY = replace(
    VARIANTS["v2-vitb"],
    clip=CLIPConfig(
        embed_dim=32, image_size=64, input_size=384, patch_size=16, vision_width=64, vision_layers=9,
        vision_heads=1, text_width=64, text_heads=1, text_layers=1,
    ),
    appearance_guidance_dim=32, hidden_dim=64, num_layers=1,
)  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def bash_lines() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def cli_arguments() -> list[list[str]]:
    """The arguments of every call of `catseg-fast` in README."""
    words = (shlex.split(line.split("&&")[-1]) for line in bash_lines())
    return [call[1:] for call in words if Path(call[0]).name == "catseg-fast"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files that README's examples name; the weights are a tiny model's."""
    torch.manual_seed(0)
    torch.save({"model": CATSeg(TINY).state_dict()}, tmp_path / "model_base.pth")
    (tmp_path / "classes.txt").write_text("sky\ntree\n")
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.jpg", "examples/street.png", "examples/scene.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(STREET, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_two_commands_of_one_line_each() -> None:
    commands = [line for line in bash_lines() if line.startswith("python3 -m venv ")]
    assert [line.count("&&") for line in commands] == [2, 2]
    assert "catseg-fast segment examples/scene.jpg" in commands[0]
    assert ".venv/bin/pytest" in commands[1]


def test_ci_runs_the_test_command_as_printed() -> None:
    (command,) = (line for line in bash_lines() if ".venv/bin/pytest" in line)
    assert command in [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]


def test_python_runs(checkout: Path) -> None:
    upstreams = torch.nn.Sequential(reference.Aggregator(**TINY.aggregator_arguments(1)))
    names: dict[str, object] = {"upstream_model": upstreams}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    model = names["model"]
    assert isinstance(model, CATSeg)
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("arguments", cli_arguments(), ids=" ".join)
def test_the_command_line_takes_the_arguments(arguments: list[str], checkout: Path) -> None:
    group = typer.main.get_group(app)
    group.commands[arguments[0]].make_context(arguments[0], arguments[1:]).close()


def test_the_first_command_finds_what_is_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled weights, on README's picture with its classes: most pixels are right."""
    monkeypatch.chdir(ROOT)
    arguments = cli_arguments()[0]
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


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


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
