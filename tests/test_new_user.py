"""The experience of a new user: times, messages, and pasted commands."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from catseg_fast import VARIANTS, CATSeg
from catseg_fast.checkpoints import hub
from catseg_fast.cli import main as cli
from catseg_fast.cli import train as train_command
from catseg_fast.cli.options import BUNDLED_NOTE, note_on_bundled
from catseg_fast.console import stages
from catseg_fast.data.scenes import write_dataset
from catseg_fast.errors import InputError, InputTypeError, RunError
from catseg_fast.export.graph import _quiet
from catseg_fast.identity import is_scene
from catseg_fast.training import Recipe
from catseg_fast.training.start import variant_of
from support.documents import ROOT, SCENE, STREET
from support.tiny import tiny_model

# Each import takes from a tenth of a second to some seconds; none is needed before a model is built.
HEAVY = (
    "timm",
    "torchvision",
    "open_clip",
    "torch._dynamo",
    "sympy",
    "triton",
    "matplotlib",
    "gradio",
    "onnx",
)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


# ---- time -------------------------------------------------------------------------------------------------


def test_importing_the_model_imports_little() -> None:
    code = f"import sys; from catseg_fast import CATSeg; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WITHOUT_TORCH = """
import json, sys
from typer.testing import CliRunner
for name in ("torch", "timm", "open_clip", "torchvision", "gradio"):
    sys.modules[name] = None  # importing it is an error
from catseg_fast.cli.main import app
answers = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    answers.append((result.exit_code, result.stderr.strip().splitlines()[-1], repr(result.exception)))
print(json.dumps(answers))
"""


def test_errors_that_need_no_model_come_before_torch(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    (tmp_path / "utf16.txt").write_bytes("sky\n".encode("utf-16"))
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "classes.json").write_text('["sky", "tree"]')
    (tmp_path / "one.txt").write_text("sky")
    segment = ["segment", "photo.png"]
    cases = [
        (["segment", "none.png"], 1, "no such file: 'none.png'"),
        (["segment", "none.png", "neither.png"], 1, "nor one of the other 1"),
        ([*segment, "--classes", "sky; sky"], 1, "'sky' is listed twice"),
        ([*segment, "--classes", "sky; tree,"], 1, "blank synonym"),
        ([*segment, "--classes-file", "utf16.txt"], 2, "is UTF-16"),
        ([*segment, "--weights", "none.pth"], 1, "no file or folder none.pth"),
        ([*segment, "--stats", "x.csv"], 2, "expected a .parquet or a .json file"),
        (["segment", "data"], 1, "holds no pictures"),
        (["eval", "--data", "none"], 1, "none/classes.json: no such file"),
        (["eval", "--data", "data", "--weights", "none.pth"], 1, "no file or folder none.pth"),
        (["eval", "--data", "data", "--classes-file", "one.txt"], 1, "1 classes are fewer"),
        (["train", "--data", "images"], 2, "images"),
        (["train", "--data", "data", "--init", "none.pth"], 1, "no file or folder none.pth"),
        (["convert", "none.pth", "x.safetensors"], 1, "no file or folder none.pth"),
        (["export", "model.pt"], 1, "must end in .onnx"),
        (["export", "model.onnx", "--weights", "none.pth"], 1, "no file or folder none.pth"),
        (["app", "--weights", "none.pth"], 1, "no file or folder none.pth"),
    ]
    call = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([arguments for arguments, _, _ in cases])]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for (arguments, code, message), (found, line, error) in zip(cases, json.loads(done.stdout), strict=True):
        assert found == code, (arguments, line, error)
        assert line.startswith("error: ")
        assert message in line, arguments


@pytest.mark.parametrize(
    "classes", [["sky", "sky"], {"sky"}, ["tree,"], {"a": []}, [], {"a": ["b"], "c": ["b"]}]
)
def test_classes_are_checked_before_anything_is_read_or_made(
    classes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("catseg_fast.model.resolve", fail)
    monkeypatch.setattr("catseg_fast.reference.clip.DenseCLIP.__init__", fail)
    with pytest.raises((InputError, InputTypeError), match=r"^classes: "):
        CATSeg.from_pretrained("v2-vitl", classes)
    with pytest.raises((InputError, InputTypeError), match=r"^classes: "):
        CATSeg("v2-vitl", classes)


# ---- the bundled weights ----------------------------------------------------------------------------------


def test_generated_scenes_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path, "train", 1, size=(96, 96), processes=1)
    scene = tmp_path / "images" / "000000.jpg"
    with Image.open(scene) as image:
        image.save(tmp_path / "again.png")  # only the JPEG files that the package has written count
    (tmp_path / "broken.jpg").write_bytes(scene.read_bytes()[:2])
    assert [is_scene(path) for path in (scene, SCENE, STREET, tmp_path / "again.png")] == [
        True,
        True,
        False,
        False,
    ]
    assert not is_scene(tmp_path / "broken.jpg")
    assert not is_scene(tmp_path)
    note_on_bundled([scene, SCENE, tmp_path / "missing.jpg"])
    assert capsys.readouterr().err == ""
    note_on_bundled([scene, STREET])
    assert capsys.readouterr().err == f"note: {BUNDLED_NOTE}\n"


def test_one_line_says_what_the_bundled_weights_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Image.open(STREET) as street:
        street.resize((64, 48)).save("photo.png")
    for options, said in (([], 1), (["--weights", "demo"], 1), (["--variant", "demo", "--overwrite"], 1)):
        result = run("segment", "photo.png", "--whole", *options)
        assert result.exit_code == 0, result.stderr
        lines = [line for line in result.stderr.splitlines() if "generated scenes only" in line]
        assert len(lines) == said
        assert "--weights v2-vitl" in lines[0]
    result = run("segment", SCENE, "--whole")
    assert "generated scenes" not in result.stderr


def test_the_first_example_of_help_has_weights() -> None:
    for command in ("", "segment", "eval", "export", "app"):
        text = run(*filter(None, (command, "--help"))).stdout
        example = text.partition("Examples")[2].strip().partition("catseg-fast")[2]
        first = " ".join(example.partition("catseg-fast")[0].split())
        assert "--weights" in first, (command, first)


# ---- the page ---------------------------------------------------------------------------------------------


def test_the_page_starts_with_a_scene_and_its_classes() -> None:
    pytest.importorskip("gradio", reason="needs the extra: app")
    from catseg_fast.app.page import build_page, example_scene

    picture, names = example_scene()
    with Image.open(SCENE) as scene:
        assert picture.size == scene.size
        assert np.abs(np.asarray(picture, float) - np.asarray(scene, float)).mean() < 4  # of JPEG
    model = tiny_model()
    for bundled in (True, False):
        parts = build_page(model, bundled=bundled).config["components"]
        values = {part["props"].get("elem_id"): part["props"].get("value") for part in parts}
        assert values["cf-classes"] == "; ".join(names)
        with Image.open(values["cf-image"]["path"]) as shown:
            assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(picture))
        assert ("--weights v2-vitl" in values["cf-head"]) == bundled
    assert len(names) == len(set(names)) > 3


# ---- training ---------------------------------------------------------------------------------------------


def clip_of(name: str) -> dict[str, torch.Tensor]:
    clip = VARIANTS[name].clip
    blocks = {
        f"visual.transformer.resblocks.{i}.ln_1.weight": torch.ones(1) for i in range(clip.vision_layers)
    }
    return {"visual.conv1.weight": torch.ones(clip.vision_width, 3, 1, 1), **blocks}


@pytest.mark.parametrize(
    ("source", "variant"),
    [
        ("v2-vitb", "v2-vitb"),
        ("v2-vitl", "v2-vitl"),
        ("v1-vith-swinb", "v1-vith-swinb"),
        ("v1-vitl-swinb", "v2-vitl"),
    ],
)
def test_clip_tells_the_variant(source: str, variant: str) -> None:
    assert variant_of(clip_of(source), "clip.pth").name == variant


def test_what_tells_no_variant() -> None:
    clip = clip_of("v2-vitb")
    clip["visual.conv1.weight"] = torch.ones(100, 3, 1, 1)
    with pytest.raises(InputError, match=r"x.pth: no variant has a CLIP .* 12 layers of 100 channels"):
        variant_of(clip, "x.pth")
    with pytest.raises(InputError, match=r"x.pth: not a CAT-Seg checkpoint"):
        variant_of({"layer1.0.conv1.weight": torch.ones(1)}, "x.pth")


def test_training_takes_the_variant_from_the_file(tmp_path: Path) -> None:
    recipe = Recipe(steps=1)
    model = train_command.build_model(None, ("sky", "tree"), recipe, hub.BUNDLED["demo"])
    assert model.variant == replace(VARIANTS["demo"], pooling_size=(2, 2))
    kept = CATSeg.from_pretrained("demo", device="cpu").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items() if name in kept)
    with pytest.raises(ValueError, match=r"demo.safetensors"):
        train_command.build_model("v2-vitb", ("sky", "tree"), recipe, hub.BUNDLED["demo"])


# ---- offline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["v2-vitl", "hamacojr/CAT-Seg-weights", "some/model/x.pth@v1.0"])
def test_without_a_network_it_fails_at_once(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One request, one message, and no line of the library."""
    asked: list[str] = []

    class Session:
        def head(self, url: str, **_: Any) -> None:
            asked.append(url)
            raise OSError("[Errno -2] Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"fetching failed: \[Errno -2\] Name or service not known\. Without"):
        hub.resolve(source)
    assert time.monotonic() - begin < 3
    assert len(asked) == 1
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert capfd.readouterr().err == ""


# ---- calls, export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: [{"image": x}]])
@pytest.mark.parametrize("kind", ["PIL", "path", "array"])
def test_a_picture_in_upstreams_call_points_to_segment(wrap: Any, kind: str) -> None:
    picture = Image.new("RGB", (8, 8))
    value = {"PIL": picture, "path": "photo.jpg", "array": np.asarray(picture)}[kind]
    with pytest.raises(InputTypeError, match=r"batched_inputs.*segment\(\) takes a single picture"):
        tiny_model()(wrap(value))


def test_stages_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with stages() as begin:
        begin("Tracing")
        begin("Writing")
    assert capsys.readouterr().err.splitlines() == ["Tracing …", "Writing …"]


def test_the_exporters_own_log_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("onnxscript.optimizer", "onnx_ir.passes")]
    before = [logger.getEffectiveLevel() for logger in loggers]
    with _quiet():
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        assert all(logger.isEnabledFor(logging.ERROR) for logger in loggers)
    assert [logger.getEffectiveLevel() for logger in loggers] == before


def test_readmes_first_command_needs_no_weights() -> None:
    assert 'CATSeg.from_pretrained("demo"' in (ROOT / "README.md").read_text()


# ---- file names that are not UTF-8 ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_names_that_are_not_utf8_can_be_written_about(suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs the extra: batch")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xfe[red]"))
    folder.mkdir()
    photo = folder / os.fsdecode(b"caf\xe9.jpg")
    with Image.open(SCENE) as scene:
        scene.resize((40, 30)).save(photo)
    stats = tmp_path / f"stats.{suffix}"
    arguments = ("segment", photo, "--whole", "--output", folder / "out", "--stats", stats)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert r"f\xfe[red]/caf\xe9.jpg" in result.stdout
    content = json.loads((folder / "out" / os.fsdecode(b"caf\xe9.json")).read_text())
    assert content["image"] == str(photo)
    if suffix == "json":
        assert {row["image"] for row in json.loads(stats.read_text())} == {str(photo)}
    else:
        import pyarrow.parquet as pq

        assert all(name.endswith(r"caf\xe9.jpg") for name in pq.read_table(stats)["image"].to_pylist())
    again = run(*arguments)
    assert "up to date" in again.stdout
