"""kill -9 before every change of files of other writers: files are whole, the next call continues.

Each test compares with what the same calls leave without a kill.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast.checkpoints.checkpoint import read_checkpoint
from catseg_fast.data.folder import FolderDataset
from catseg_fast.data.published import import_dataset
from catseg_fast.data.scenes import write_dataset
from catseg_fast.export import graph as export
from catseg_fast.text import features_cache
from catseg_fast.text.features_cache import FeaturesCache
from catseg_fast.training.trainer import Trainer
from support.command_line import save_tiny_checkpoint
from support.data_sets import add, make_dataset
from support.kill_calls import CALLS, call, content_of, in_turn, nothing, slow
from support.kill_points import Content, kill_everywhere
from support.tiny import V2, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
COPIES = ((True, True), (False, True))


# ---- data sets --------------------------------------------------------------------------------------------


def imported(folder: Path) -> str:
    """Check that a data set that can be read is one of the two, and whole."""
    try:
        found = {entry["name"]: entry["sem_seg"].tolist() for entry in FolderDataset(folder)}
    except (ValueError, FileNotFoundError) as error:
        return f"refused: {type(error).__name__}"
    kinds = {
        "from 0": {"x": [[0, 1], [255, 2]], "y": [[0, 1], [255, 2]]},
        "from 1": {"x": [[255, 0], [255, 1]], "y": [[255, 0], [255, 1]]},
    }
    return next(name for name, expected in kinds.items() if found == expected)


@pytest.mark.parametrize(
    "copies", [(False, False), (True, False), *(pytest.param(x, marks=slow) for x in COPIES)]
)
@pytest.mark.parametrize(("before", "last"), CALLS)
def test_import(copies: tuple[bool, bool], last: str, before: str, tmp_path: Path) -> None:
    for name in "xy":
        for part in ("im", "gt"):
            (tmp_path / part).mkdir(exist_ok=True)
        Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / "im" / f"{name}.png")
        Image.fromarray(np.array([[0, 1], [255, 2]], np.uint8)).save(tmp_path / "gt" / f"{name}.png")
    out = tmp_path / "out"

    def load(first: int) -> Callable[[], object]:
        names = ["sky", "tree", "sea"]
        return lambda: import_dataset(
            tmp_path / "im", tmp_path / "gt", names, out, first=first, copy=copies[first]
        )

    table = kill_everywhere(*in_turn(before, last, load(0), load(1)), out, content_of, imported)
    print("import", copies, before, last, table)
    assert table.points > 10
    assert table.states.keys() == {"refused: FileNotFoundError", *(["from 0"] if before == "A" else [])}


def test_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process: the harness tells of its own changes only."""

    class Serial:
        def __init__(self, processes: int | None) -> None: ...
        def __enter__(self) -> Serial:
            return self

        def __exit__(self, *_: object) -> None: ...
        def map(self, call: Callable[[int], object], numbers: list[int], chunksize: int) -> Any:
            return map(call, numbers)

    monkeypatch.setattr("catseg_fast.data.scenes.dataset.ProcessPoolExecutor", Serial)
    out = tmp_path / "out"

    def work() -> None:
        write_dataset(out, "train", 2, size=(96, 96))

    def check(folder: Path) -> str:
        try:
            return f"{len(FolderDataset(folder))} scenes"
        except (ValueError, FileNotFoundError) as error:
            return f"refused: {type(error).__name__}"

    table = kill_everywhere(nothing, work, work, out, content_of, check)
    print("scenes", table)
    assert table.states.keys() == {"refused: FileNotFoundError", "2 scenes"}


# ---- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_convert(suffix: str, tmp_path: Path) -> None:
    source, out = save_tiny_checkpoint(tmp_path), tmp_path / "out"
    target = out / f"model{suffix}"

    def check(folder: Path) -> str:
        return "earlier" if target.read_bytes() == b"earlier" else f"{len(read_checkpoint(target))} tensors"

    def work() -> None:
        call("convert", source, target)

    table = kill_everywhere(lambda: target.write_bytes(b"earlier"), work, work, out, content_of, check)
    print("convert", suffix, table)
    assert table.points > 5
    assert len(table.states) == 2


class Program:
    """In the place of what torch exports to ONNX."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save(self, path: Path, external_data: bool) -> None:
        path.write_text(self.name)
        path.with_name(f"{path.name}.data").write_text(self.name)


@pytest.mark.parametrize(("before", "last"), CALLS)
def test_export(last: str, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny_model(), tmp_path / "out"
    pytest.importorskip("onnxscript", reason="needs the extra: export")
    monkeypatch.setattr(export, "export_program", lambda model, crops: model)
    monkeypatch.setattr(export, "_weight_bytes", lambda program: 0)
    monkeypatch.setattr(torch.onnx, "export", lambda model, **_: Program(model.classes[0]))

    def write(name: str) -> Callable[[], None]:
        def work() -> None:
            model.set_classes([name, "tree"])
            export.export_onnx(model, out / "model.onnx", crops=1 if name == "old" else 2)

        return work

    def check(folder: Path) -> str:
        if not (folder / "model.onnx").exists():
            return "no model"
        name = (folder / "model.onnx").read_text()
        assert (folder / "model.onnx.data").read_text() == name
        assert np.load(folder / "model.classes.npz")["classes"].tolist() == [name, "tree"]
        card = json.loads((folder / "model.json").read_text())
        assert card["inputs"]["images"]["shape"][0] == (1 if name == "old" else 2)
        return name

    works = in_turn(before, last, write("old"), write("new"))
    table = kill_everywhere(*works, out, _without_npz, check)
    print("export", before, last, table)
    assert table.states.keys() == {"no model", "new", *(["old"] if before == "A" else [])}


def _without_npz(folder: Path) -> Content:
    """The content of a folder, .npz files as what is in them, as they hold the time."""
    content = content_of(folder)
    for path in folder.rglob("*.npz"):
        content[path.name] = {name: array.tolist() for name, array in np.load(path).items()}
    return content


@pytest.mark.parametrize(("before", "last"), CALLS)
def test_train(every: int, last: str, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = make_dataset(tmp_path / "data"), tmp_path / "out"
    add(data, "bb", np.array([[0, 1, 2], [1, 1, 0]], dtype=np.uint8))
    model = tiny_model(variant=V2, backend="torch")
    monkeypatch.setattr("catseg_fast.cli.train.build_model", lambda *_: deepcopy(model))

    def take(self: Trainer, batch: object) -> tuple[float, float, float, int]:
        """A step that costs little, and leaves something in the optimiser."""
        for parameter in self.trained[:2]:
            parameter.grad = torch.full_like(parameter, self.step + self.recipe.lr)
        self.optimiser.step()
        return float(self.step), self.recipe.lr, 1.0, 3

    monkeypatch.setattr(Trainer, "_take", take)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # which writes at times of its own
    common = ("train", "--data", data, "-o", out, "--steps", 3, "--save-every", 1, "--crop-size", 32)
    common += ("--workers", 0, "--device", "cpu", "--batch-size", 2)

    def first() -> None:
        call(*common, "--lr", 0.1, "--fresh")

    def second() -> None:
        call(*common, "--lr", 0.2, "--fresh")

    def resumed() -> None:
        call(*common, "--lr", 0.2)

    works = in_turn(before, last, first, second, resumed)
    table = kill_everywhere(*works, out, content_of, every=every)
    print("train", before, last, table)
    assert table.points * every > 20


# ---- caches and tuned configs -----------------------------------------------------------------------------


def test_text_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_cache, "SMALL_FILES", 3)
    out, key = tmp_path / "out", "a" * 32
    names = {f"{number:032x}": torch.full((2, 3), float(number)) for number in range(10)}

    def work() -> None:
        """Two entries at a time, which are then merged."""
        cache = FeaturesCache(out)
        missing = names.keys() - cache.load(key, set(names)).keys()
        for start in range(0, len(names), 2):
            chunk = {name: names[name] for name in list(names)[start : start + 2] if name in missing}
            if chunk:
                cache.store(key, chunk)

    def read(folder: Path) -> Content:
        found = FeaturesCache(folder).load(key, set(names))
        return {name: tensor.tolist() for name, tensor in found.items()}

    def check(folder: Path) -> str:
        found = FeaturesCache(folder).load(key, set(names))
        assert all(torch.equal(tensor, names[name]) for name, tensor in found.items())
        return f"{len(found)} entries"

    table = kill_everywhere(nothing, work, work, out, read, check)
    print("text features", table)
    assert table.states.keys() == {f"{count} entries" for count in range(0, 11, 2)}


def test_tune(tmp_path: Path) -> None:
    tuner = pytest.importorskip("catseg_fast.engine.tuner")
    out = tmp_path / "out"
    path = out / "GPU" / "mlp.json"
    versions = {"gpu": "GPU", "triton": "3", "torch": "2", "catseg_fast": "0", "date": "2026-01-01"}
    entries = [
        {
            "kernel": "mlp",
            "dtype": "fp16",
            "precision": "ieee",
            "shape": {"hidden": number, "crop_classes": 255},
            "config": {"rows": 16},
        }
        for number in range(3)
    ]

    def save(*numbers: int) -> Callable[[], None]:
        def work() -> None:
            for number in numbers:
                tuner.save(path, "GPU", {**entries[number], **versions})

        return work

    def check(folder: Path) -> str:
        return "no file" if not path.exists() else str(len(json.loads(path.read_text())))

    table = kill_everywhere(save(0), save(1, 2), save(1, 2), out, content_of, check)
    print("tune", table)
    assert table.states.keys() == {"1", "2", "3"}
