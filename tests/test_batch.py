"""`catseg-fast segment` over many pictures: what it finds, repeats and writes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg
from catseg_fast.cli.batch import Batch, Decoded, Outcome, _Job
from catseg_fast.cli.inputs import Picture, find_pictures
from catseg_fast.cli.resume import fingerprint, finished
from catseg_fast.errors import InputError
from catseg_fast.inference.images import load_image
from catseg_fast.output.results import summarise
from catseg_fast.output.statistics import write_statistics
from catseg_fast.text.class_lists import NOUNS, READY_LISTS, parse_classes, read_classes, ready_list
from catseg_fast.text.prompts import check_classes
from support.tiny import CLASSES, tiny_model


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", sliding_window=False)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures of several sizes in photos/ and photos/more/."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("b.png", "a.PNG", "more/a.png", "more/c.png", ".hidden.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(index).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((20 + 2 * index, 16), Image.Resampling.BICUBIC)
        picture.save(path, format="PNG")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path


def names(pictures: list[Picture]) -> list[tuple[str, str]]:
    return [(picture.path.as_posix(), picture.result("json").as_posix()) for picture in pictures]


def go(model: CATSeg, **options: object) -> list[Outcome]:
    """Segment all pictures of photos/ into out/."""
    about = {"fingerprint": fingerprint(model, None, 0, 0.55)}
    work = Batch(model, about, **options)  # type: ignore[arg-type]
    return list(work.run(find_pictures([Path("photos")], Path("out"))))


def test_folders_keep_their_tree(photos: Path) -> None:
    expected = [
        ("photos/a.PNG", "out/a.json"),
        ("photos/b.png", "out/b.json"),
        ("photos/more/a.png", "out/more/a.json"),
        ("photos/more/c.png", "out/more/c.json"),
    ]
    assert names(find_pictures([Path("photos")], Path("out"))) == expected


def test_globs_files_and_names_that_meet(photos: Path) -> None:
    arguments = [Path("photos/**/[ac].*"), Path("none.png"), Path("photos/b.png"), Path("*.gif")]
    assert names(find_pictures(arguments, Path("out"))) == [
        ("photos/a.PNG", "out/a.json"),
        ("photos/more/a.png", "out/a-2.json"),
        ("photos/more/c.png", "out/c.json"),
        ("none.png", "out/none.json"),
        ("photos/b.png", "out/b.json"),
        ("*.gif", "out/*.json"),
    ]


def test_urls_are_not_fetched() -> None:
    with pytest.raises(InputError, match=r"https:/example\.com/a\.jpg: is a URL; download it first"):
        find_pictures([Path("https://example.com/a.jpg")], Path("out"))


def test_results_are_no_pictures(photos: Path) -> None:
    output = Path("photos/out")
    output.mkdir()
    Image.new("RGB", (2, 2)).save(output / "b.overlay.png")
    found = names(find_pictures([Path("photos"), Path("photos/*/*.png")], output))
    assert len(found) == 6
    assert not any("overlay" in path for path, _ in found)
    Path("empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no pictures$"):
        find_pictures([Path("empty")], output)


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_written_is_the_models_answer(photos: Path, model: CATSeg, size: int) -> None:
    outcomes = go(model, size=size, threads=2)
    assert sorted(outcome.index for outcome in outcomes) == [0, 1, 2, 3]
    for outcome in outcomes:
        path = outcome.picture.path
        expected = model.segment(load_image(path).round())
        content = json.loads(outcome.picture.result("json").read_text())
        with Image.open(outcome.picture.result("labels.png")) as labels:
            agree = np.array(labels) == expected.labels.numpy()
        assert agree.mean() > 0.99  # a batch rounds differently
        shares = {entry["index"]: entry["share"] for entry in content["classes"]}
        assert all(shares.values())  # a class that does not occur is not listed
        for entry in summarise(expected):
            assert shares.get(entry["index"], 0) == pytest.approx(entry["share"], abs=0.01)
        assert (content["image"], outcome.error) == (str(path), None)
        assert outcome.summary == content["classes"]


def test_what_is_there_and_valid_is_not_done_again(photos: Path, model: CATSeg) -> None:
    def done() -> list[str]:
        return sorted(
            outcome.picture.path.name for outcome in go(model, threads=1) if outcome.seconds is not None
        )

    assert done() == ["a.PNG", "a.png", "b.png", "c.png"]
    assert done() == []
    Path("out/b.overlay.png").unlink()
    labels = Path("out/a.labels.png")
    labels.write_bytes(labels.read_bytes()[: labels.stat().st_size // 2])
    Image.new("I;16", (3, 3)).save("out/more/a.labels.png")
    assert done() == ["a.PNG", "a.png", "b.png"]
    os.utime("photos/b.png", (0, 0))
    assert done() == []
    with Path("photos/b.png").open("ab") as file:
        file.write(b"more")
    assert done() == ["b.png"]
    assert len([outcome for outcome in go(model, overwrite=True) if outcome.seconds is not None]) == 4


def test_the_fingerprint_tells_weights_classes_and_options(tmp_path: Path, model: CATSeg) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"1")
    seen = {fingerprint(model, weights, 0, 0.5)}
    assert fingerprint(model, weights, 1, 0.5) in seen  # the seed is that of untrained weights
    weights.write_bytes(b"2")
    seen |= {fingerprint(model, file, seed, 0.5) for file, seed in ((weights, 0), (None, 0), (None, 1))}
    seen.add(fingerprint(model, None, 0, 0.6))
    seen.add(fingerprint(tiny_model("v2", CLASSES[:2], sliding_window=False), None, 0, 0.5))
    seen.add(fingerprint(tiny_model("v2", max_classes=3, sliding_window=False), None, 0, 0.5))
    seen.add(fingerprint(tiny_model("v2"), None, 0, 0.5))
    assert len(seen) == 8


def test_decoding_runs_ahead_of_the_model(
    photos: Path, model: CATSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next pictures are read during the model's first one, which is written during its second one."""
    read, writing = threading.Semaphore(0), threading.Event()
    segment, save = CATSeg.segment, Batch._write
    calls: list[object] = []

    def decode(self: Batch, job: _Job) -> Decoded:
        read.release()
        return Decoded(load_image(job.picture.path), None)

    def slow(self: CATSeg, image: torch.Tensor) -> object:
        calls.append(image)
        if len(calls) == 1:
            assert all(read.acquire(timeout=60) for _ in range(3))
        if len(calls) == 2:
            assert writing.wait(60)
        return segment(self, image)

    def write(self: Batch, *arguments: object) -> object:
        writing.set()
        return save(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Batch, "_decode", decode)
    monkeypatch.setattr(Batch, "_write", write)
    monkeypatch.setattr(CATSeg, "segment", slow)
    assert all(outcome.error is None for outcome in go(model, threads=2))
    assert len(calls) == 4


def test_only_one_of_a_batch_fails(photos: Path, model: CATSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = CATSeg.segment

    def picky(self: CATSeg, image: torch.Tensor) -> object:
        if image.shape[-1] == 22:
            raise RuntimeError("out of memory")
        return segment(self, image)

    def fails(self: CATSeg, images: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(CATSeg, "segment", picky)
    monkeypatch.setattr(CATSeg, "segment_batch", fails)
    errors = {outcome.picture.path.name: outcome.error for outcome in go(model, size=4)}
    assert str(errors.pop("a.PNG")) == "out of memory"
    assert errors == {"b.png": None, "a.png": None, "c.png": None}


@pytest.fixture
def results(photos: Path, model: CATSeg) -> list[Path]:
    return [outcome.picture.result("json") for outcome in go(model)]


def expected_rows(results: list[Path]) -> list[tuple[str, str, int]]:
    """Return image, class and pixels, counted in the label maps."""
    rows = []
    for result in results:
        content = json.loads(result.read_text())
        with Image.open(result.with_name(result.stem + ".labels.png")) as image:
            found, counts = np.unique(np.array(image), return_counts=True)
        for label, count in zip(found.tolist(), counts.tolist(), strict=True):
            rows.append((content["image"], CLASSES[label], count))
    return rows


def test_statistics_as_json(results: list[Path]) -> None:
    expected = expected_rows(results)
    assert write_statistics(Path("stats/all.json"), results) == len(expected)
    rows = json.loads(Path("stats/all.json").read_text())
    assert [(row["image"], row["class"], row["pixels"]) for row in rows] == expected
    assert os.listdir("stats") == ["all.json"]
    write_statistics(Path("none.json"), [])
    assert json.loads(Path("none.json").read_text()) == []


def test_statistics_as_parquet(results: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("catseg_fast.output.statistics.GROUP", 3)
    expected = expected_rows(results)
    write_statistics(Path("all.parquet"), results)
    table = parquet.read_table("all.parquet").to_pydict()
    assert list(zip(table["image"], table["class"], table["pixels"], strict=True)) == expected
    write_statistics(Path("all.json"), results)
    rows = json.loads(Path("all.json").read_text())
    assert {name: [row[name] for row in rows] for name in table} == table


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_statistics_replace_only_statistics(tmp_path: Path, suffix: str, rows: int) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow.parquet")
    entry = {"index": 0, "name": "sky", "share": 1.0, "mean_score": 0.5}
    result, path = tmp_path / "a.json", tmp_path / f"stats.{suffix}"
    result.write_text(json.dumps({"image": "a", "width": 2, "height": 2, "classes": [entry] * rows}))
    for _ in range(2):
        assert write_statistics(path, [result]) == rows
    for content in ('["sky", "tree"]', "[\n {},\n]", "[\n", ""):
        path.write_text(content)
        with pytest.raises(FileExistsError, match="does not hold statistics"):
            write_statistics(path, [result])
        assert path.read_text() == content


def test_statistics_that_fail_leave_nothing(photos: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_statistics(Path("stats.json"), [Path("none.json")])
    assert not list(photos.glob("stats*"))


def test_finished_of_nothing(photos: Path) -> None:
    assert finished(find_pictures([Path("photos/b.png")], Path("out"))[0], "x") is None


@pytest.mark.parametrize("name", [name for name in READY_LISTS if name not in ("pas-20b", NOUNS)])
def test_ready_lists(name: str, tmp_path: Path) -> None:
    entry = ready_list(name.upper())
    assert len(check_classes(entry.classes)) == int(name.partition("-")[2])
    assert entry.source.startswith("https://")
    assert entry.licence
    assert parse_classes(f" {name} ") == entry.classes
    path = tmp_path / "names.txt"
    path.write_text("\n".join(entry.classes))
    assert read_classes(path) == entry.classes


def test_nouns_are_many_and_clip_can_tell_them_apart() -> None:
    names = check_classes(ready_list(NOUNS).classes)
    assert len(names) > 11_000
    assert {"crane", "chair", "tench", "umbrella"} <= set(names)
    assert len({name.lower() for name in names}) == len(names)
    assert not any("," in name or "_" in name for name in names)


def test_ready_lists_hold_what_the_data_sets_are_known_for() -> None:
    known = {
        "ade-150": (0, "wall"),
        "ade-847": (2, "sky"),
        "pc-459": (0, "accordion"),
        "lvis-1203": (1202, "zucchini, courgette"),
        "pas-20": (19, "tvmonitor"),
    }
    assert {name: ready_list(name).classes[index] for name, (index, _) in known.items()} == {
        name: expected for name, (_, expected) in known.items()
    }
    background = ready_list("pas-20b").classes
    assert list(background) == [*ready_list("pas-20").classes, "background"]
    assert background["background"][::38] == ["bag", "wood"]
    with pytest.raises(ValueError, match=r"ade-151.*ade-150"):
        ready_list("ade-151")
