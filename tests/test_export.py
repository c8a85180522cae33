"""The model as a program and as ONNX: the reference's results, for vocabularies of any size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from catseg_fast import CATSeg, export
from catseg_fast.cli import export as export_command
from catseg_fast.cli import main as cli
from catseg_fast.reference.inference import SlidingWindow, resize
from catseg_fast.reference.model import normalise
from support.tiny import CLASSES, V1, V2, close, picture, tiny_model

NAMES = [f"thing {index}" for index in range(11)]  # more than the 8 classes that v2 pads to
pytestmark = pytest.mark.xdist_group("export")  # one process exports


def reference_logits(model: CATSeg, images: Tensor) -> Tensor:
    model.backend, model.max_classes = "reference", None
    with torch.no_grad():
        return model.logits(*normalise(images))


@pytest.mark.parametrize(("version", "crops"), [("v1", 1), ("v2", 2)])
def test_a_program_is_the_model(version: Any, crops: int) -> None:
    model = tiny_model(version, variant=replace(V1 if version == "v1" else V2, num_layers=1))
    program = export.export_program(model, crops=crops)
    run = program.module()
    images = torch.stack([picture(384, 384, str(index)) for index in range(crops)])
    for count in (5, 1, 11):
        model.set_classes(NAMES[:count])
        with torch.no_grad():
            answer = run(images, model.text_features())
        assert close(answer, reference_logits(model, images), 1e-4)
    text_tower = sum(parameter.numel() for parameter in model.clip_model.text_parameters())
    weights = sum(tensor.numel() for tensor in program.state_dict.values())
    assert weights < sum(parameter.numel() for parameter in model.parameters()) - text_tower / 2


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="crops: 0 is not positive"):
        export.export_program(model, crops=0)
    with pytest.raises(ValueError, match="training mode"):
        export.export_program(tiny_model().train())
    with pytest.raises(ValueError, match=r"path: .*model.pt must end in .onnx"):
        export.export_onnx(model, tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="path: there is no folder"):
        export.export_onnx(model, tmp_path / "nowhere" / "model.onnx")
    for name in ("model.json", "model.classes.npz", "model.onnx.data"):
        other = tmp_path / name
        other.write_text('{"format": "mine"}')
        with pytest.raises(FileExistsError, match=f"path: {other} is there and is not of an export"):
            export.export_onnx(model, tmp_path / "model.onnx")
        other.unlink()
    pytest.importorskip("onnxscript", reason="needs the extra: export")
    with pytest.raises(ValueError, match=r"model: is in torch.float64"):
        export.export_onnx(tiny_model().double(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def tiny(names: Sequence[str]) -> CATSeg:
    return tiny_model(classes=names, variant=replace(V2, num_layers=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files that the command writes for a tiny model."""
    pytest.importorskip("onnx", reason="needs the extra: export")
    pytest.importorskip("onnxscript", reason="needs the extra: export")

    def build(
        weights: str | None, variant: str | None, names: list[str], seed: int, **options: object
    ) -> CATSeg:
        assert (weights, variant) == ("tiny.pth", None)
        assert options == {"device": "cpu", "dtype": "float32", "text_cache": True}
        return tiny(names)

    folder = tmp_path_factory.mktemp("export")
    arguments = ["--weights", "tiny.pth", "--classes", "; ".join(CLASSES)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_command, "build_model", build)
        result = CliRunner().invoke(cli.app, ["export", str(folder / "model.onnx"), *arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.json", "model.classes.npz"}
    assert "model.onnx (" in result.output
    return folder


@pytest.fixture(scope="module")
def session(folder: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    return runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("count", [11, 1])
def test_onnx_is_the_model(session: Any, count: int) -> None:
    model = tiny(NAMES[:count])
    images = picture(384, 384)[None]
    inputs = {"images": images.numpy(), "text_features": model.text_features().numpy()}
    (answer,) = session.run(["logits"], inputs)
    assert close(torch.from_numpy(answer), reference_logits(model, images), 1e-4)


def test_the_card_is_enough_to_segment_a_picture(folder: Path, session: Any) -> None:
    """Run the model like another program, with numpy, resizing and the card only."""
    card = json.loads((folder / "model.json").read_text())
    vocabulary = np.load(folder / card["vocabulary"])
    assert vocabulary["classes"].tolist() == list(CLASSES)
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "images": card["inputs"]["images"]["shape"],
        "text_features": ["classes", *vocabulary["text_features"].shape[1:]],
    }
    image, side = picture(60, 80), card["inputs"]["images"]["shape"][-1]
    inputs = {
        "images": resize(image[None], (side, side)).numpy(),
        "text_features": vocabulary["text_features"],
    }
    logits = torch.from_numpy(session.run(None, inputs)[0])
    scores, labels = resize(logits.sigmoid(), (60, 80))[0].max(dim=0)
    model = tiny(CLASSES)
    expected = model.segment(image, sliding_window=False)
    assert torch.allclose(scores, expected.scores, atol=1e-4)
    assert (labels == expected.labels).float().mean() > 0.999
    assert card["sliding_window"]["corners"] == [list(corner) for corner in SlidingWindow().corners()]
