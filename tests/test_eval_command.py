"""The command `eval`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg
from catseg_fast.cli.eval import combine
from catseg_fast.data.folder import FolderDataset
from catseg_fast.evaluation.metrics import ClassCounts
from support.command_line import lines_of, run, save_tiny_checkpoint
from support.data_sets import write_data
from support.scores import IGNORE, slow_scores


def test_combinations() -> None:
    names = [c.name for c in combine(["reference", "torch"], ["float32"], ["float32", "float16"])]
    assert names == ["reference-float32", "torch-float32-float32", "torch-float32-float16"]
    assert [c.name for c in combine(["auto"], ["float32"], None)] == ["auto-float32"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pictures in `data` and a checkpoint, `tiny.pth`."""
    root = tmp_path_factory.mktemp("small")
    write_data(root / "data", 2)
    save_tiny_checkpoint(root)
    return root


def test_the_command(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    options = ["--data", small / "data", "--weights", small / "tiny.pth", "--whole", "--output", out]
    result = run(
        "eval", *options, "--backend", "reference", "--backend", "torch", "--activations", "--top", 1
    )
    assert result.exit_code == 0, result.output
    for text in (
        "reference-float32",
        "torch-float32",
        "layer 1, classes, apply",
        "house, home",
        "2 images; wrote",
    ):
        assert text in result.stdout
    found = json.loads((out / "results.json").read_text())
    reference, engine = found["results"]
    assert [reference["runs_on"], engine["runs_on"]] == ["reference", "torch"]
    assert reference["label_agreement"] is None
    assert engine["label_agreement"] >= 0.999
    assert engine["mIoU"] == pytest.approx(reference["mIoU"], abs=1e-3)
    assert engine["activations"]["decode"] > 0
    assert reference["activations"] == {}
    assert found["environment"]["torch"] == torch.__version__
    assert len(reference["weights_sha256"]) == 64

    model = CATSeg.from_pretrained(small / "tiny.pth", found["classes"], device="cpu", backend="reference")
    pairs = []
    for entry in FolderDataset(small / "data"):
        labels = model.segment(entry["image"], sliding_window=False).labels
        saved = np.array(Image.open(out / "reference-float32.labels" / f"{entry['name']}.png"))
        assert np.array_equal(labels, saved)
        pairs.append((labels, entry["sem_seg"]))
    slow = slow_scores(pairs, 3)
    assert {key: reference[key] for key in slow} == pytest.approx(slow, rel=1e-12)

    monkeypatch.setattr(CATSeg, "segment", None)  # everything is done
    again = run("eval", *options, "--backend", "reference", "--backend", "torch", "--activations")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "results.json").read_text()) == found

    other = run("eval", *options, "--backend", "reference")
    assert other.exit_code == 1
    assert "is of another evaluation: activations was True and is False" in other.stderr


def test_more_classes_than_the_data_set_s(small: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("heaven\noak\nhut\nsea\n")
    options = ["--data", small / "data", "--weights", small / "tiny.pth", "--whole", "--limit", 1]
    files = ["--classes-file", tmp_path / "names.txt", "--output", tmp_path / "out"]
    result = run("eval", *options, *files)
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [row["name"] for row in found["classes"]] == ["heaven", "oak", "hut", "sea"]
    assert found["classes"][3]["truth"] == 0
    assert found["images"] == 1


def test_bad_input_gets_a_line(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "few.txt").write_text("sky\n")
    (tmp_path / "fold.json").write_text('{"tree": ["oak"], "plant": ["fern", "oak"]}')
    damaged = write_data(tmp_path / "damaged", 1).root
    Image.fromarray(np.full((20, 24), 9, dtype=np.uint8)).save(damaged / "annotations" / "a.png")
    weights = ["--weights", small / "tiny.pth", "--whole"]
    cases = [
        (["--data", tmp_path / "none"], 1, "none/classes.json: no such file"),
        (["--data", small / "data", "--output", tmp_path / "file"], 2, "is not a folder"),
        (["--data", small / "data", "--output", tmp_path / "file" / "out", *weights], 1, "Not a directory"),
        (["--data", small / "data", "--classes-file", tmp_path / "few.txt"], 1, "1 classes are fewer than"),
        (["--data", small / "data", "--ignore-unlabelled"], 2, "needs --min-score"),
        (["--data", small / "data", "--min-score", 1.5], 2, "Invalid value for '--min-score'"),
        (["--data", small / "data", "--classes-file", tmp_path / "fold.json"], 1, "'oak' is a name of"),
        (["--data", small / "data", "--backend", "fast"], 2, "'fast' is not one of"),
        (["--data", small / "data", "--weights", tmp_path / "w.pth"], 1, "w.pth"),
        (["--data", damaged, "--output", tmp_path / "out", *weights], 1, "a.png: the annotation has index 9"),
    ]
    for options, code, message in cases:
        if "--output" not in options:
            options = [*options, "--output", tmp_path / "out"]
        result = run("eval", *options)
        assert result.exit_code == code, (options, result.output)
        assert message in " ".join(result.stderr.replace("│", " ").split()), result.stderr
        assert "Traceback" not in result.output
        if code == 1:
            assert lines_of(result.stderr)[-1].startswith("error:")


def test_several_names_of_a_class_and_pixels_of_none(small: Path, tmp_path: Path) -> None:
    """The names are in the data set's class list, or in that of the options."""
    classes = {"sky": ["sky"], "tree": ["oak", "fir"], "house, home": ["hut", "castle", "home"]}
    shutil.copytree(small / "data", tmp_path / "data")
    (tmp_path / "data" / "classes.json").write_text(json.dumps(classes))
    (tmp_path / "names.json").write_text(json.dumps(classes))
    model = CATSeg.from_pretrained(small / "tiny.pth", classes, device="cpu")
    entries = list(FolderDataset(small / "data"))
    threshold = model.segment(entries[0]["image"], sliding_window=False).scores.median().item()
    options = ["--weights", small / "tiny.pth", "--whole", "--min-score", threshold]
    own = ["--data", tmp_path / "data", "--output", tmp_path / "own"]
    given = ["--data", small / "data", "--classes-file", tmp_path / "names.json"]
    given += ["--output", tmp_path / "given"]
    found = []
    for arguments in (own, given):
        result = run("eval", *options, *arguments)
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / arguments[-1] / "results.json").read_text()))
    assert [row["classes"] for row in found[0]["results"]] == [row["classes"] for row in found[1]["results"]]
    assert found[0]["fold"] == classes
    (row,) = found[0]["results"]
    assert [entry["name"] for entry in row["classes"]] == list(classes)
    assert 0 < row["unlabelled"] < 1

    pairs = []
    for entry in entries:
        labels = model.segment(entry["image"], sliding_window=False, min_score=threshold).labels
        saved = np.array(Image.open(tmp_path / "own" / "auto-float32.labels" / f"{entry['name']}.png"))
        assert np.array_equal(labels.numpy().astype(np.uint16), saved)
        pairs.append(ClassCounts.of(labels, entry["sem_seg"], 3, IGNORE))
    assert row["mIoU"] == sum(pairs, ClassCounts.none(3)).scores()["mIoU"]
    other = run("eval", *options, *own, "--ignore-unlabelled")
    assert "is of another evaluation: ignore_unlabelled was False and is True" in other.stderr
    again = run("eval", *options, *own, "--ignore-unlabelled", "--restart")
    assert again.exit_code == 0, again.output
    (ignoring,) = json.loads((tmp_path / "own" / "results.json").read_text())["results"]
    assert ignoring["unlabelled"] == row["unlabelled"]
    assert ignoring["pACC"] > row["pACC"]
