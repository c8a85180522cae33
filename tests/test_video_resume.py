"""Videos whose run was interrupted: frames that are done are used again if they are what they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from catseg_fast import CATSeg, Segmentation
from catseg_fast.cli.inputs import Picture
from support.disk import small_disk
from support.tiny import tiny_model
from support.videos import clips, scene, write_video

pytest.importorskip("av", reason="needs the extra: video")


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", sliding_window=False)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def segmented(model: CATSeg, monkeypatch: pytest.MonkeyPatch) -> list[Segmentation]:
    """The answers of the model, one per frame that it is given."""
    segment, answers = model.segment, []
    monkeypatch.setattr(
        model, "segment", lambda *args, **kwargs: answers.append(segment(*args, **kwargs)) or answers[-1]
    )
    return answers


def repainted(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Change a label map as an image editor that keeps the text chunks."""

    def change_file(path: Path) -> None:
        with Image.open(path) as image:
            info = PngInfo()
            for key, value in image.text.items():  # type: ignore[attr-defined]
                info.add_text(key, value)
            Image.fromarray(change(np.array(image))).save(path, pnginfo=info)

    return change_file


DAMAGES: dict[str, Callable[[Path], object]] = {
    "none": lambda path: None,
    "removed": Path.unlink,
    "repainted": repainted(lambda labels: labels ^ 1),
    "of another size": repainted(lambda labels: labels[:-1]),
    "of 8 bits": repainted(lambda labels: labels.astype(np.uint8)),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_frames_that_are_done_are_not_segmented_again(
    damage: str, model: CATSeg, segmented: list[Segmentation], tmp_path: Path
) -> None:
    """The results are those of a run without an interruption, sums included."""
    path, out = write_video(tmp_path / "a.mp4", 4), tmp_path / "out"
    clip = Picture(path, out, "a")
    assert clips(model, min_score=0.3).run(0, clip, lambda *_: None).error is None
    expected = content_of(out)
    (out / "a.json").unlink()
    (out / "a.overlay.mp4").unlink()
    (out / "a.labels/000003.png").unlink()
    DAMAGES[damage](out / "a.labels/000001.png")
    segmented.clear()
    seen: list[tuple[int, int]] = []
    assert clips(model, min_score=0.3).run(0, clip, lambda *x: seen.append(x)).error is None
    assert len(segmented) == (1 if damage == "none" else 2)
    assert seen == [(count, 4) for count in range(5)]
    assert content_of(out) == expected


@pytest.mark.parametrize("size", [0, 200])
def test_a_full_disk(size: int, model: CATSeg, tmp_path: Path) -> None:
    clip, out = Picture(write_video(tmp_path / "a.mp4", 3), tmp_path / "out", "a"), tmp_path / "out"
    with small_disk(size):
        outcome = clips(model).run(0, clip, lambda *_: None)
    assert isinstance(outcome.error, OSError), outcome.error
    assert not (out / "a.json").exists()
    assert clips(model).run(0, clip, lambda *_: None).error is None
    assert json.loads((out / "a.json").read_text())["frames"] == 3


def test_label_maps_of_others_are_not_replaced(model: CATSeg, tmp_path: Path) -> None:
    clip = Picture(write_video(tmp_path / "a.mp4", 2), tmp_path / "out", "a")
    assert clips(model).run(0, clip, lambda *_: None).error is None
    edited = tmp_path / "out/a.labels/000001.png"
    Image.open(edited).copy().save(edited)  # by an editor that drops the text
    before = content_of(tmp_path / "out")
    assert isinstance(clips(model).run(0, clip, lambda *_: None).error, FileExistsError)
    assert content_of(tmp_path / "out") == before


def test_frames_of_other_settings_are_segmented_again(
    model: CATSeg, segmented: list[Segmentation], tmp_path: Path
) -> None:
    clip = Picture(write_video(tmp_path / "a.mp4", 3), tmp_path / "out", "a")
    for options in ({}, {"every": 2}, {"rate": Fraction(3)}, {"overwrite": True, "rate": Fraction(3)}):
        segmented.clear()
        assert clips(model, **options).run(0, clip, lambda *_: None).error is None
        assert len(segmented) == (2 if "every" in options else 3)
    write_video(clip.path, 2)  # other content
    segmented.clear()
    assert clips(model).run(0, clip, lambda *_: None).error is None
    assert len(segmented) == len(list((tmp_path / "out/a.labels").iterdir())) == 2


def test_two_runs_at_once(model: CATSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused, and leaves the files of the first as they are."""
    clip = Picture(write_video(tmp_path / "a.mp4", 2), tmp_path / "out", "a")
    segment, errors = model.segment, []

    def second(image: torch.Tensor) -> Segmentation:
        if not errors:
            errors.append(None)  # of the second, whose frames are not segmented
            outcome = clips(model, every=2).run(0, clip, lambda *_: None)
            errors[:] = [outcome.error]
        return segment(image)

    monkeypatch.setattr(model, "segment", second)
    assert clips(model).run(0, clip, lambda *_: None).error is None
    assert str(errors[0]) == f"{tmp_path / 'out/a.labels'} is in use by another run, which writes to it"
    assert clips(model).run(0, clip, lambda *_: None).seconds is None


def test_results_in_the_folder_of_the_frames(model: CATSeg, tmp_path: Path) -> None:
    """They are no frames, and the next run finds the folder as it was."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(2):
        Image.fromarray(scene(index)).save(folder / f"{index}.png")
    clip = Picture(folder, folder, "frames")
    assert clips(model).run(0, clip, lambda *_: None).seconds is not None
    assert clips(model).run(0, clip, lambda *_: None).seconds is None
    Image.fromarray(scene(3)).save(folder / "1.png")
    assert clips(model).run(0, clip, lambda *_: None).seconds is not None
