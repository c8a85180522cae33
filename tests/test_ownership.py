"""Results of `catseg-fast segment`: owners of files, results that are up to date, files that are kept."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from catseg_fast.cli.inputs import Picture, find_pictures
from catseg_fast.cli.resume import finished
from catseg_fast.console import check_folder
from catseg_fast.data.pairs import find_pairs
from catseg_fast.errors import InputError
from catseg_fast.identity import content_digest, read_png_mark
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.output.ownership import PNG_SUFFIXES, Owner, is_result, owner_of
from catseg_fast.output.results import save_segmentation

SUFFIXES = (*PNG_SUFFIXES, ".json")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(path: str, colour: tuple[int, int, int] = (0, 255, 0)) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)
    return Path(path)


def save(picture: Picture, label: int = 0, fingerprint: str = "x") -> None:
    """Segment like `Batch`, with a model that predicts `label` everywhere."""
    answer = Segmentation(torch.full((6, 8), label).int(), torch.ones(6, 8), ("sky", "tree"))
    save_segmentation(
        picture.folder, picture.stem, torch.zeros(3, 6, 8), answer,
        {"image": str(picture.path), "fingerprint": fingerprint},
        picture=picture.path, digest=content_digest(picture.path),
    )  # fmt: skip


def segment(*arguments: str, output: str, label: int = 0) -> list[tuple[str, str]]:
    """Segment pictures that are not up to date; return each picture and the stem of its results."""
    pictures = find_pictures([Path(argument) for argument in arguments], Path(output))
    for picture in pictures:
        if finished(picture, "x") is None:
            save(picture, label)
    return [(picture.path.as_posix(), (picture.folder / picture.stem).as_posix()) for picture in pictures]


def tree() -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


@pytest.mark.parametrize("arguments", [["photos"], ["photos/*"], ["photos/a.png", "photos/more/b.png"]])
def test_output_into_the_folder_of_the_pictures(arguments: list[str]) -> None:
    draw("photos/a.png")
    draw("photos/more/b.png")
    first = segment(*arguments, output="photos")
    before = tree()
    for _ in range(2):
        assert segment(*arguments, output="photos") == first
    assert tree() == before


@pytest.mark.parametrize("output", ["photos", "photos/out", "elsewhere"])
def test_results_of_an_earlier_run_are_no_pictures(output: str) -> None:
    draw("photos/a.png")
    draw("photos/more/b.png")
    segment("photos", output=output)
    for other in ("new", "photos"):
        for arguments in (["photos", output], ["photos/**/*.png", f"{output}/**/*.png"], list(tree())):
            pictures = find_pictures([Path(argument) for argument in arguments], Path(other))
            assert {picture.path.as_posix() for picture in pictures} == {"photos/a.png", "photos/more/b.png"}


def test_there_are_only_results() -> None:
    draw("a.png")
    segment("a.png", output="out")
    with pytest.raises(InputError, match=r"out: there are only results"):
        find_pictures([Path("out")], Path("again"))
    with pytest.raises(InputError, match=r"out/a.json: there are only results"):
        find_pictures([Path("out/a.json"), Path("out/a.labels.png")], Path("again"))


def test_results_with_a_json_file_that_was_lost() -> None:
    """After a kill there is no JSON file; after a power failure it can be empty."""
    draw("photos/a.png")
    segment("photos", output="photos")
    for content in (b"", b'{"image": "photos/a.p'):
        Path("photos/a.json").write_bytes(content)
        assert [p.path.name for p in find_pictures([Path("photos")], Path("photos"))] == ["a.png"]
    Path("photos/a.json").unlink()
    assert segment("photos", output="photos") == [("photos/a.png", "photos/a")]
    for name in SUFFIXES:
        Path("photos", f"b{name}").touch()
    assert [p.path.name for p in find_pictures([Path("photos")], Path("photos"))] == ["a.png"]


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a.json": lambda path: path.write_text('{"shapes": [1, 2, 3]}'),
    "a.overlay.png": lambda path: draw(str(path), (1, 2, 3)),
    "a.labels.png": lambda path: Image.new("L", (8, 6)).save(path),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_not_replaced(name: str) -> None:
    draw("photos/a.png")
    foreign = Path("photos", name)
    FOREIGN[name](foreign)
    before = foreign.read_bytes()
    with pytest.raises(FileExistsError, match="is not a result of catseg-fast"):
        save(Picture(Path("photos/a.png"), Path("photos"), "a"))
    notices: list[str] = []
    find_pictures([Path("photos/a.png")], Path("photos"), notices.append)
    assert notices == [
        "photos/a.png: its results are photos/a-2.*; a file named a.* is not a result of catseg-fast"
    ]
    for _ in range(2):
        assert segment("photos/a.png", output="photos") == [("photos/a.png", "photos/a-2")]
    assert foreign.read_bytes() == before
    assert sorted(path for path in tree() if "a-2" in path) == sorted(f"photos/a-2{end}" for end in SUFFIXES)


@pytest.mark.parametrize("suffix", PNG_SUFFIXES)
def test_a_file_of_others_in_a_result_s_place_is_not_replaced(suffix: str) -> None:
    """A user replaced a result by a picture, or corrected a label map."""
    draw("a.png")
    segment("a.png", output="out")
    mine = draw(f"out/a{suffix}", (9, 9, 9)).read_bytes()
    assert segment("a.png", output="out") == [("a.png", "out/a-2")]
    assert Path(f"out/a{suffix}").read_bytes() == mine


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_results_are_done_again(suffix: str, damage: str) -> None:
    draw("a.png")
    segment("a.png", output="out")
    before = tree()
    path = Path(f"out/a{suffix}")
    if damage == "missing":
        path.unlink()
    elif suffix != ".json":  # nothing is known of such a file
        path.write_bytes(path.read_bytes()[:-8])
    assert segment("a.png", output="out") == [("a.png", "out/a")]
    assert tree() == before


def test_one_name_from_two_folders() -> None:
    draw("p/x.png", (1, 1, 1))
    draw("q/x.png", (2, 2, 2))
    assert segment("p/x.png", output="out") == [("p/x.png", "out/x")]
    before = Path("out/x.json").read_bytes()
    assert segment("q/x.png", output="out", label=1) == [("q/x.png", "out/x-2")]
    assert Path("out/x.json").read_bytes() == before
    assert segment("q/x.png", "p/x.png", output="out") == [("q/x.png", "out/x-2"), ("p/x.png", "out/x")]
    with pytest.raises(FileExistsError, match="results of another picture"):
        save(Picture(Path("p/x.png"), Path("out"), "x-2"))


def test_one_relative_name_from_two_working_directories(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, folder in enumerate(("p", "q")):
        draw(f"{here}/{folder}/x.png", (index, 0, 0))
        monkeypatch.chdir(here / folder)
        segment("x.png", output="../out", label=index)
    labels = [np.array(Image.open(here / "out" / name)).max() for name in ("x.labels.png", "x-2.labels.png")]
    assert labels == [0, 1]


@pytest.mark.parametrize("time", [None, 1.5e9, 4e9])
def test_another_picture_under_the_same_name(time: float | None) -> None:
    """Its time stamp does not matter, and sizes are equal."""
    picture = Picture(Path("a.bmp"), Path("out"), "a")
    draw("a.bmp", (0, 255, 0))
    old = os.stat("a.bmp")
    save(picture)
    assert finished(picture, "x") is not None
    assert finished(picture, "y") is None
    draw("a.bmp", (255, 0, 0))
    assert os.stat("a.bmp").st_size == old.st_size
    os.utime("a.bmp", (old.st_atime, old.st_mtime) if time is None else (time, time))
    assert finished(picture, "x") is None
    assert segment("a.bmp", output="out") == [("a.bmp", "out/a")]


def test_results_go_along_with_a_picture_that_moved() -> None:
    draw("here/photos/a.png")
    segment("here/photos", output="here/out")
    labels = os.stat("here/out/a.labels.png").st_mtime_ns
    Path("here").rename("there")
    assert segment("there/photos", output="there/out", label=1) == [("there/photos/a.png", "there/out/a")]
    assert os.stat("there/out/a.labels.png").st_mtime_ns == labels
    assert json.loads(Path("there/out/a.json").read_text())["image"] == "there/photos/a.png"


@pytest.mark.parametrize("step", range(4))
def test_a_kill_between_two_steps_mixes_nothing(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """B's results were replacing A's."""
    draw("a.png")
    picture = Picture(Path("a.png"), Path("out"), "a")
    save(picture, label=0, fingerprint="A")
    labels = Path("out/a.labels.png").read_bytes()
    done = 0

    class Killed(BaseException):
        pass

    def counting(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal done
            if done == step:
                raise Killed
            done += 1
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("catseg_fast.output.results.os.replace", counting(os.replace))
        patch.setattr(Path, "unlink", counting(Path.unlink))
        with pytest.raises(Killed):
            save(picture, label=1, fingerprint="B")
    assert (finished(picture, "A") is None) == (step > 0)
    assert finished(picture, "B") is None
    assert owner_of(Path("out"), "a", Path("a.png")) is Owner.THIS_PICTURE
    assert owner_of(Path("out"), "a", Path("b.png")) is Owner.OTHER_PICTURE
    assert [p.stem for p in find_pictures([Path("a.png")], Path("out"))] == ["a"]
    assert all(is_result(path) for path in Path("out").iterdir() if path.name[0] != ".")
    save(picture, label=0, fingerprint="A")
    assert finished(picture, "A") is not None
    assert Path("out/a.labels.png").read_bytes() == labels


def test_old_and_new_results_that_were_mixed() -> None:
    """An older JSON file beside a newer label map, as earlier versions could leave them."""
    draw("a.png")
    picture = Picture(Path("a.png"), Path("out"), "a")
    save(picture, label=0, fingerprint="A")
    result = Path("out/a.json").read_bytes()
    save(picture, label=1, fingerprint="B")
    Path("out/a.json").write_bytes(result)
    assert finished(picture, "A") is None


def test_results_of_earlier_versions() -> None:
    """Their JSON files only have a fingerprint: they are not pictures, and the results are replaced."""
    draw("photos/a.png")
    content = {"image": "photos/a.png", "fingerprint": "x", "width": 8, "height": 6, "classes": []}
    Path("photos/a.json").write_text(json.dumps(content))
    for suffix in PNG_SUFFIXES:
        draw(f"photos/a{suffix}")
    assert [p.path.name for p in find_pictures([Path("photos")], Path("new"))] == ["a.png"]
    assert segment("photos", output="photos") == [("photos/a.png", "photos/a")]
    assert read_png_mark("photos/a.labels.png") is not None


@pytest.mark.parametrize("output", [".", "p", "out"])
def test_a_glob_s_pictures_with_any_output(output: str) -> None:
    draw("p/a.png")
    draw("p/q/b.png")
    for _ in range(2):
        assert [path for path, _ in segment("p/**/*.png", output=output)] == ["p/a.png", "p/q/b.png"]


def test_names_that_are_not_utf_8(here: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        draw(name)
    except OSError:
        pytest.skip("the file system has names in UTF-8 only")
    segment(name, output="out")
    assert finished(find_pictures([Path(name)], Path("out"))[0], "x") is not None


def test_linked_folders_are_searched_once() -> None:
    draw("data/x.png")
    draw("photos/y.png")
    Path("photos/linked").symlink_to("../data")
    Path("photos/once-more").symlink_to("../data")
    Path("photos/circle").symlink_to(".")
    notices: list[str] = []
    pictures = find_pictures([Path("photos")], Path("out"), notices.append)
    assert [p.path.as_posix() for p in pictures] == ["photos/linked/x.png", "photos/y.png"]
    assert [p.folder.as_posix() for p in pictures] == ["out/linked", "out"]
    assert notices == ["photos: left out 2 linked folders already searched"]


def test_a_folder_comes_before_a_link_to_it() -> None:
    draw("photos/z/x.png")
    Path("photos/a").symlink_to("z")
    assert [p.path.as_posix() for p in find_pictures([Path("photos")], Path("out"))] == ["photos/z/x.png"]


@pytest.mark.parametrize("suffix", [".jfif", ".jp2", ".JPE", ".pgm", ".tga", ".apng", ".ico"])
def test_every_format_that_pillow_decodes(suffix: str) -> None:
    Path("photos").mkdir()
    Path(f"photos/a{suffix}").touch()
    assert len(find_pictures([Path("photos")], Path("out"))) == 1


def test_what_is_left_out_is_counted() -> None:
    draw("photos/a.png")
    segment("photos", output="photos")
    for name in ("b.txt", "c.txt", "d.mp4", "README", ".hidden.png", ".git/x.png", "e.eps"):
        Path("photos", name).parent.mkdir(exist_ok=True)
        Path("photos", name).touch()
    notices: list[str] = []
    find_pictures([Path("photos")], Path("out"), notices.append)
    assert notices == [
        "photos: left out 3 results of catseg-fast, 5 other files (2 .txt, 1 .eps, 1 .mp4, 1 no suffix), "
        "2 hidden files and folders"
    ]
    notices.clear()
    find_pictures([Path("photos/*")], Path("out"), notices.append)
    assert notices[0].startswith("photos/*: left out 3 results of catseg-fast, 5 other files")


def test_folders_that_cannot_be_read_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    draw("photos/a.png")
    draw("photos/closed/b.png")
    scan = os.scandir

    def scandir(path: str) -> object:
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    notices: list[str] = []
    assert len(find_pictures([Path("photos")], Path("out"), notices.append)) == 1
    assert notices == ["photos: left out 1 folder that cannot be read"]
    notices.clear()
    (pair,) = find_pairs(Path("photos"), Path("photos"), notices.append)
    assert pair.name == "a"
    assert notices == ["photos: left out 1 folders that cannot be read"] * 2


def test_of_two_runs_at_once_each_puts_its_files_in_place_together(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first has put one of its files in place."""
    pytest.importorskip("fcntl", reason="needs a system that can lock a folder")
    (picture,) = find_pictures([draw("a.png")], Path("out"))
    replace, others = os.replace, list[threading.Thread]()

    def replacing(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target) == picture.result("labels.png") and not others:
            others.append(threading.Thread(target=save, args=(picture, 1, "second")))
            others[0].start()
            others[0].join(0.5)
            assert others[0].is_alive()

    monkeypatch.setattr(os, "replace", replacing)
    save(picture, 0, "first")
    others[0].join()
    assert finished(picture, "second") is not None
    assert np.array(Image.open(picture.result("labels.png"))).all()


def test_folders_that_cannot_be(here: Path) -> None:
    """Links that lead to themselves, and names that are too long, are no bugs of this package."""
    draw("photos/a.png")
    for name in ("loop", "photos/loop", "photos/loop.png"):
        Path(name).symlink_to(Path(name).name)
    pictures = find_pictures([Path("photos")], Path("loop"))
    assert Path("photos/a.png") in [picture.path for picture in pictures]
    for output in (Path("loop"), Path("n" * 300), Path("photos/a.png/below")):
        assert check_folder(output) == output
        with pytest.raises(OSError, match=r"loop|nnn|below"):
            save(find_pictures([Path("photos/a.png")], output)[0])
    with pytest.raises(typer.BadParameter, match="is not a folder"):
        check_folder(Path("photos/a.png"))
