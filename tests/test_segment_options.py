"""`segment`: pixels of none, many names, large vocabularies, and what is listed of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg, Segmentation
from catseg_fast.cli.labelling import Labelling, limit_classes
from catseg_fast.labels import NONE_NAME
from catseg_fast.output.ownership import Owner, owner_of
from catseg_fast.output.results import save_segmentation, summarise
from support.command_line import lines_of, outputs, run, written
from support.tiny import tiny_model

NAMES = {"sky": ["sky"], "background": ["wall", "floor", "door"], "person, man": ["person, man"]}


def label_png_of(path: Path) -> np.ndarray:
    with Image.open(path) as labels:
        assert labels.mode == "I;16"
        return np.array(labels)


def test_everything_knows_the_pixels_of_none(workplace: Path, weights: Path) -> None:
    (workplace / "names.json").write_text(json.dumps(NAMES))
    model = CATSeg.from_pretrained(weights, NAMES, device="cpu")
    every = model.segment("photo.png", sliding_window=False, top_k=2)
    threshold = every.scores.median().item()
    options = ["photo.png", "--classes-file", "names.json", "--weights", weights, "--whole"]
    options += ["--min-score", threshold, "--top-k", 2, "--stats", "stats.json", "--output", "out"]
    result = run("segment", *options)
    assert result.exit_code == 0, result.output
    assert written(workplace / "out") == outputs("photo") | {"photo.top.npz"}
    expected = every.with_min_score(threshold)
    share = (expected.labels == -1).double().mean().item()
    assert 0 < share < 1

    stored = label_png_of(workplace / "out" / "photo.labels.png")
    assert np.array_equal(stored, expected.labels.numpy().astype(np.uint16))
    assert stored.max() == 65535
    content = json.loads((workplace / "out" / "photo.json").read_text())
    assert (content["min_score"], content["unlabelled_value"]) == (threshold, 65535)
    assert content["classes"] == [entry for entry in summarise(expected) if entry["share"]]
    assert sum(entry["share"] for entry in content["classes"]) == pytest.approx(1)
    none = content["classes"][-1]
    assert (none["index"], none["name"], none["share"]) == (-1, NONE_NAME, share)
    assert none["mean_score"] == pytest.approx(every.scores[expected.labels == -1].mean().item())
    rows = json.loads((workplace / "stats.json").read_text())
    assert sum(row["pixels"] for row in rows) == 40 * 30
    assert [(row["index"], row["class"]) for row in rows][-1] == (-1, NONE_NAME)
    assert NONE_NAME in result.stdout

    with np.load(workplace / "out" / "photo.top.npz", allow_pickle=False) as top:
        assert expected.top_labels is not None
        assert top["labels"].dtype == np.uint16
        assert np.array_equal(top["labels"], expected.top_labels.numpy().astype(np.uint16))
        assert np.array_equal(top["scores"], expected.top_scores)
        assert top["classes"].tolist() == list(NAMES)

    again = run("segment", *options)
    assert "up to date" in again.stdout
    for change in (["--min-score", 0.99], ["--top-k", 1], ["--present", 0.5]):
        assert "up to date" not in run("segment", *options, *change).stdout
    without = run("segment", *options[:6], "--output", "out")
    assert without.exit_code == 0, without.output
    assert written(workplace / "out") == outputs("photo")  # of the same picture: no old top classes stay


def test_best_classes_of_others_are_not_replaced(workplace: Path, weights: Path) -> None:
    (workplace / "segmented").mkdir()
    np.savez(workplace / "segmented" / "photo.top.npz", mine=np.zeros(3))
    assert owner_of(workplace / "segmented", "photo", workplace / "photo.png") is Owner.STRANGER
    arguments = ["photo.png", "--classes", "sky; tree", "--weights", weights, "--whole", "--top-k", 1]
    assert run("segment", *arguments).exit_code == 0
    assert np.load(workplace / "segmented" / "photo.top.npz").files == ["mine"]
    assert written(workplace / "segmented") == {"photo.top.npz", "photo-2.top.npz"} | outputs("photo-2")


def test_only_what_is_present_is_listed(workplace: Path, weights: Path) -> None:
    names = "; ".join(f"thing number {index}" for index in range(40))
    options = ["photo.png", "--classes", names, "--weights", weights, "--whole", "--stats", "stats.json"]
    assert run("segment", *options, "--output", "all").exit_code == 0
    every = json.loads((workplace / "all" / "photo.json").read_text())["classes"]
    shares = sorted(entry["share"] for entry in every)
    least = shares[len(shares) // 2]
    assert least > shares[0]
    assert run("segment", *options, "--present", least, "--output", "large").exit_code == 0
    large = json.loads((workplace / "large" / "photo.json").read_text())
    assert large["present"] == least
    assert large["classes"] == [entry for entry in every if entry["share"] >= least]
    rows = json.loads((workplace / "stats.json").read_text())
    assert [row["class"] for row in rows] == [entry["name"] for entry in large["classes"]]


def test_dropped_classes_are_told(workplace: Path, weights: Path) -> None:
    names = "; ".join(f"thing number {index}" for index in range(300))
    options = ["photo.png", "--classes", names, "--weights", weights, "--whole", "--overwrite"]
    expected = {
        (): "note: of 300 classes, each crop aggregates the 256 that fit it best, and drops the others; "
        "--all-classes aggregates all, --best N another number",
        ("--best", "7"): "note: of 300 classes, each crop aggregates the 7 that fit it best",
        ("--best", "300"): "",
        ("--all-classes",): "",
    }
    for change, note in expected.items():
        result = run("segment", *options, *change, "--explain", "--memory", "1GiB")
        assert result.exit_code == 0, result.output
        assert "\n".join(lines_of(result.stderr)).startswith(note)
        assert bool(note) == ("fit it best" in result.stderr)
        kept = {(): "the best 256", ("--best", "7"): "the best 7"}.get(change, "all aggregated")
        assert kept in result.stdout
        assert "the budget is 1.0 GiB" in result.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--min-score", "1.2"], 2, "--min-score"),
        (["--present", "-1"], 2, "--present"),
        (["--best", "0"], 2, "--best"),
        (["--best", "3", "--all-classes"], 2, "give --all-classes or this, not both"),
        (["--top-k", "0"], 2, "--top-k"),
        (["--memory", "much"], 1, "--memory: 'much' is not an amount such as '2GiB'"),
        (["--classes-file", "none.json"], 2, "none.json"),
        (["--classes-file", "empty.json"], 2, "empty.json: 'sky' has no names; list at least one"),
    ],
)
def test_bad_options(workplace: Path, weights: Path, options: list[str], code: int, message: str) -> None:
    (workplace / "empty.json").write_text('{"sky": []}')
    result = run("segment", "photo.png", "--weights", weights, *options)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert not (workplace / "segmented").exists()


def test_a_limit_is_told_only_where_it_counts() -> None:
    model = tiny_model("v2", ["sky", "tree", "wall"], max_classes=2)
    note = limit_classes(model, False, None)
    assert note is not None
    assert "of 3 classes, each crop aggregates the 2 that fit" in note
    assert limit_classes(model, False, 3) is None
    assert model.max_classes == 3
    assert limit_classes(model, True, None) is None
    assert model.max_classes is None


def test_what_is_asked_for_reaches_the_model() -> None:
    model = tiny_model("v2", sliding_window=False)
    image = torch.full((3, 24, 30), 90, dtype=torch.uint8)
    plain = model.segment(image, top_k=2)
    threshold = plain.scores.max().item()
    asked = Labelling(model, top_k=2, min_score=threshold)
    for answer in (asked.segment(image), *asked.segment_batch([image])):
        assert answer.top_labels is not None
        assert len(answer.top_labels) == 2
        assert answer.min_score == threshold
        assert (answer.labels == -1).any()
    assert asked.settings == {"top_k": 2, "min_score": threshold}
    assert Labelling(model).settings == {}
    assert Labelling(model).segment(image).top_labels is None


def test_saved_best_classes_are_among_the_paths(tmp_path: Path) -> None:
    image = torch.full((3, 24, 30), 90, dtype=torch.uint8)
    answer = tiny_model("v2", sliding_window=False).segment(image, top_k=2)
    paths = answer.save(tmp_path, stem="photo")
    assert {path.name for path in paths} == written(tmp_path) == outputs("photo") | {"photo.top.npz"}


def test_indices_of_sixteen_bits_leave_room_for_none(tmp_path: Path) -> None:
    classes = tuple(map(str, range(65536)))
    labels = torch.tensor([[0, 65534]], dtype=torch.int32)
    answer = Segmentation(labels, torch.ones(1, 2), classes, labels[None], torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="classes: 16 bits hold 65535, got 65536"):
        save_segmentation(tmp_path, "photo", torch.zeros(3, 1, 2), answer, {})
    assert written(tmp_path) == set()
