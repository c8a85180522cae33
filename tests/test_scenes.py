"""Generated scenes: their content, held-out combinations, and the folders to which they are written."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from catseg_fast.cli.main import app
from catseg_fast.data.folder import FolderDataset
from catseg_fast.data.scenes import SPLITS, draw_scene, write_dataset
from catseg_fast.data.scenes.baseline import NearestColour
from catseg_fast.data.scenes.shapes import DISTANCES, pattern
from catseg_fast.data.scenes.textures import TEXTURES
from catseg_fast.data.scenes.words import (
    COLOURS,
    COMPOSITIONS,
    GROUNDS,
    HELD_OUT,
    PATTERNS,
    SHAPES,
    SYNONYMS,
    TRAINED,
    Composition,
    choose_held_out,
)
from catseg_fast.errors import InputError


def red(shape: str, name: str = "plain") -> Composition:
    return Composition(PATTERNS.index(name), 0, SHAPES.index(shape))


def test_held_out_compositions_are_made_of_trained_pairs() -> None:
    assert len(HELD_OUT) == 64
    assert sorted((*HELD_OUT, *TRAINED)) == sorted(COMPOSITIONS)
    for places in combinations(range(3), 2):
        pairs = [{tuple(t.words[i] for i in places) for t in things} for things in (TRAINED, HELD_OUT)]
        assert pairs[1] <= pairs[0]


def test_words_are_told_apart() -> None:
    words = [*PATTERNS, *COLOURS, *SHAPES, *GROUNDS]
    assert sorted(SYNONYMS) == sorted(words)
    assert len({*words, *SYNONYMS.values()}) == 2 * len(words)
    assert list(TEXTURES) == list(GROUNDS)
    assert list(DISTANCES) == list(SHAPES)


def test_no_trained_name_is_in_a_list_of_held_out_ones() -> None:
    trained = {name for label in SPLITS["train"].class_names for name in label.split(", ")}
    things = {thing.name for thing in SPLITS["held-out"].things}
    assert not trained & things
    synonyms = {thing.synonym for thing in SPLITS["synonyms"].things}
    assert not trained & synonyms
    assert [len(SPLITS[name].classes) for name in SPLITS] == [264, 20, 200, 20]
    assert len(set(SPLITS["held-out-200"].class_names)) == 200
    assert SPLITS["held-out-200"].classes[:20] == SPLITS["held-out"].classes == SPLITS["synonyms"].classes


@pytest.mark.parametrize("count", [1, 8, 16])
def test_chosen_held_out_compositions_are_spread(count: int) -> None:
    chosen = choose_held_out(count)
    assert len(set(chosen)) == count
    assert all(thing.held_out for thing in chosen)
    for part in ("pattern", "colour", "shape"):
        counts = np.bincount([getattr(thing, part) for thing in chosen])
        assert counts.max() <= max(1, count // 4)


@pytest.mark.parametrize("count", [0, 65])
def test_a_bad_number_of_held_out_compositions(count: int) -> None:
    with pytest.raises(ValueError, match=f"count: {count} is not in 1..64"):
        choose_held_out(count)


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_signed_and_no_steeper_than_one(shape: str) -> None:
    y, x = np.mgrid[-1.5:1.5:301j, -1.5:1.5:301j].astype(np.float32)
    distance = DISTANCES[shape](x, y)
    assert (distance < 0).mean() > 0.08
    border = np.concatenate([distance[0], distance[-1], distance[:, 0], distance[:, -1]])
    assert (border > 0.1).all()
    steepness = np.hypot(*np.gradient(distance, 0.01))
    assert np.percentile(steepness, 99) < 1.05


@pytest.mark.parametrize(
    ("name", "share"), [("plain", 0.0), ("striped", 0.5), ("checked", 0.5), ("dotted", 0.28)]
)
def test_share_of_a_patterns_second_colour(name: str, share: float) -> None:
    v, u = np.mgrid[0:400, 0:400].astype(np.float32)
    assert pattern(name, u, v, 20.0).mean() == pytest.approx(share, abs=0.02)


def test_labels_are_where_the_colours_are() -> None:
    """Pixels labelled as red things are redder than those labelled as grass."""
    things = [red("disc"), red("star")]
    for seed in range(5):
        scene = draw_scene(np.random.default_rng(seed), things, ("grass",))
        assert scene.image.shape == (384, 384, 3)
        assert set(scene.things) <= {"grass", *things}
        assert set(np.unique(scene.labels)) == set(range(len(scene.things)))
        redness = scene.image[..., 0].astype(float) - scene.image[..., 1]
        thing = scene.labels > 0
        assert (redness[thing] > 40).mean() > 0.97
        assert (redness[~thing] < 40).mean() > 0.97


def test_a_scene_depends_only_on_its_generator() -> None:
    first, again, other = (draw_scene(np.random.default_rng(seed), TRAINED) for seed in (3, 3, 4))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert first.things == again.things
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize(
    ("things", "grounds", "size", "message"),
    [
        ((), GROUNDS, (96, 96), "at least one of each"),
        (TRAINED, (), (96, 96), "at least one of each"),
        (TRAINED, GROUNDS, (95, 384), "95x384 is below 96x96"),
    ],
)
def test_bad_arguments(
    things: tuple[Composition, ...], grounds: tuple[str, ...], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_scene(np.random.default_rng(0), things, grounds, size)


@pytest.mark.parametrize("split", ["train", "held-out-200"])
def test_a_written_data_set_can_be_read(split: str, tmp_path: Path) -> None:
    write_dataset(tmp_path, split, 3, seed=5, size=(96, 128), processes=1)
    dataset = FolderDataset(tmp_path)
    assert dataset.classes == tuple(SPLITS[split].class_names)
    assert dataset.names == ("000000", "000001", "000002")
    scene = draw_scene(np.random.default_rng([5, 1]), SPLITS[split].things, SPLITS[split].grounds, (96, 128))
    entry = dataset[1]
    indices = [SPLITS[split].classes.index(thing) for thing in scene.things]
    assert np.array_equal(entry["sem_seg"].numpy(), np.array(indices)[scene.labels])
    difference = entry["image"].permute(1, 2, 0).numpy().astype(float) - scene.image
    assert np.abs(difference).mean() < 4  # of JPEG


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    write_dataset(tmp_path / "whole", "held-out", 3, size=(96, 96), processes=1)
    write_dataset(tmp_path / "part", "held-out", 2, size=(96, 96), processes=1)
    first = tmp_path / "part" / "annotations" / "000000.png"
    first.unlink()
    kept = (tmp_path / "part" / "images" / "000001.jpg").stat().st_mtime_ns
    steps: list[None] = []
    write_dataset(
        tmp_path / "part", "held-out", 3, size=(96, 96), processes=1, advance=lambda: steps.append(None)
    )
    assert len(steps) == 3
    assert (tmp_path / "part" / "images" / "000001.jpg").stat().st_mtime_ns == kept
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "part" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_a_folder_of_other_scenes_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, "held-out", 1, size=(96, 96), processes=1)
    with pytest.raises(ValueError, match="is of other scenes"):
        write_dataset(tmp_path, "held-out", 1, seed=1, size=(96, 96), processes=1)
    with pytest.raises(ValueError, match="split: 'test' is not one of"):
        write_dataset(tmp_path, "test", 1)


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "scenes.json").write_text("{")
    with pytest.raises(InputError, match=r"scenes\.json is damaged"):
        write_dataset(tmp_path, "held-out", 1, size=(96, 96), processes=1)


def test_the_nearest_colour(tmp_path: Path) -> None:
    classes = ("grass", red("disc"), Composition(0, list(COLOURS).index("blue"), 0))
    scene = draw_scene(np.random.default_rng(0), classes[1:], ("grass",))
    found = NearestColour(classes)(scene.image)
    expected = np.array([classes.index(thing) for thing in scene.things])[scene.labels]
    assert (found == expected).mean() > 0.9


def test_the_command(tmp_path: Path) -> None:
    arguments = ["scenes", str(tmp_path / "s"), "--split", "synonyms", "--count", "1", "--size", "96"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 scenes of the split 'synonyms'" in result.output
    with Image.open(tmp_path / "s" / "images" / "000000.jpg") as image:
        assert image.size == (96, 96)
    assert json.loads((tmp_path / "s" / "classes.json").read_text())[0] == "wood planks"
    bad = CliRunner().invoke(app, ["scenes", str(tmp_path / "s"), "--split", "synonyms", "--seed", "7"])
    assert bad.exit_code == 1
    assert "is of other scenes" in bad.output
