"""Videos and folders of frames: every frame gets the model's own answer, and what is done is kept."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from catseg_fast import CATSeg, Segmentation
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.main import app
from catseg_fast.data import frames
from catseg_fast.data.frames import natural_order, open_frames
from catseg_fast.errors import MissingPackageError
from catseg_fast.output.ownership import Owner, is_result, owner_of
from catseg_fast.output.results import summarise
from catseg_fast.output.totals import Totals
from support.tiny import CLASSES, picture, tiny_model
from support.videos import HEIGHT, WIDTH, clips, decoded, labels_in, write_video

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", sliding_window=False)


@pytest.mark.parametrize("every", [1, 5])
def test_frames_of_a_file(tmp_path: Path, every: int) -> None:
    path = write_video(tmp_path / "clip.mp4")
    opened = open_frames(path, every)
    assert (opened.rate, opened.count) == (Fraction(10, every), -(-12 // every))
    found = list(opened)
    assert [frame.index for frame in found] == list(range(0, 12, every))
    assert [frame.time for frame in found] == [Fraction(index, 10) for index in range(0, 12, every)]
    for frame, pixels in zip(found, decoded(path)[::every], strict=True):
        assert frame.image.dtype == torch.uint8
        np.testing.assert_array_equal(frame.image.permute(1, 2, 0).numpy(), pixels)
        assert abs(int(frame.image[0, -1, -1]) - (10 + 9 * frame.index)) < 6


def test_frames_are_turned_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 2)
    plain = next(iter(open_frames(path))).image
    content = bytearray(path.read_bytes())
    one, zero = (0x10000).to_bytes(4, "big"), bytes(4)
    matrix = one + 3 * zero + one + 3 * zero + (0x40000000).to_bytes(4, "big")
    start = content.index(matrix, content.index(b"tkhd"))
    turned = zero + one + zero + (-0x10000).to_bytes(4, "big", signed=True) + 2 * zero
    content[start : start + 24] = turned  # clockwise, as phones write it
    path.write_bytes(content)
    upright = next(iter(open_frames(path))).image
    assert torch.equal(upright, torch.rot90(plain, -1, (1, 2)))


def test_frames_of_a_folder(tmp_path: Path) -> None:
    for name, grey in (("f10.png", 30), ("f2.png", 20), ("f1.png", 10), (".f0.png", 0)):
        Image.new("RGB", (4, 3), (grey,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("none")
    opened = open_frames(tmp_path, 2, Fraction(10))
    assert (opened.rate, opened.count) == (5, 2)
    assert [(frame.index, frame.time, int(frame.image.max())) for frame in opened] == [
        (0, 0, 10), (2, Fraction(1, 5), 30),
    ]  # fmt: skip
    names = ["a1", "a2", "a10", "b", "2", "10"]
    assert sorted(map(Path, names), key=natural_order) == list(map(Path, ["2", "10", "a1", "a2", "a10", "b"]))


def test_what_is_written_is_the_models_answer(model: CATSeg, tmp_path: Path) -> None:
    path, out = write_video(tmp_path / "clip.mp4"), tmp_path / "out"
    seen: list[tuple[int, int]] = []
    outcome = clips(model, every=2).run(0, Picture(path, out, "clip"), lambda *x: seen.append(x))
    assert outcome.error is None
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
    answers = [model.segment(frame.transpose(2, 0, 1)) for frame in decoded(path)[::2]]
    labels = labels_in(out / "clip.labels")
    assert list(labels) == ["000000", "000002", "000004", "000006", "000008", "000010"]
    for found, answer in zip(labels.values(), answers, strict=True):
        np.testing.assert_array_equal(found, answer.labels.numpy())
    content = json.loads((out / "clip.json").read_text())
    shares = np.mean([[entry["share"] for entry in summarise(answer)] for answer in answers], axis=0)
    np.testing.assert_allclose([entry["share"] for entry in content["classes"]], shares, atol=1e-12)
    assert (content["frames"], content["rate"], content["complete"]) == (6, 5.0, True)
    assert {file.name for file in out.iterdir()} == {"clip.json", "clip.labels", "clip.overlay.mp4"}
    with av.open(str(out / "clip.overlay.mp4")) as container:
        painted = list(container.decode(video=0))
        assert [frame.time for frame in painted] == pytest.approx([0.2 * index for index in range(6)])
        assert (painted[0].height, painted[0].width) == (HEIGHT + 1, WIDTH)
    assert owner_of(out, "clip", path) is Owner.THIS_PICTURE
    (out / "clip.json").unlink()
    assert owner_of(out, "clip", path) is Owner.THIS_PICTURE
    assert owner_of(out, "clip", tmp_path / "other.mp4") is Owner.OTHER_PICTURE
    assert is_result(out / "clip.overlay.mp4")
    assert is_result(out / "clip.labels" / "000000.png")


def test_the_vocabulary_is_encoded_once(
    model: CATSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.set_classes([*CLASSES, "a new one"])
    calls = []
    encode = model.text_encoder.encode
    monkeypatch.setattr(
        model.text_encoder, "encode", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs)
    )
    try:
        clips(model).run(0, Picture(write_video(tmp_path / "a.mp4"), tmp_path, "a"), lambda *_: None)
    finally:
        monkeypatch.undo()
        model.set_classes(CLASSES)
    assert calls == [1]


def test_decoding_runs_beside_the_model(
    model: CATSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third frame is decoded while the model still has the first one."""
    third, segment = threading.Event(), model.segment
    upright = frames._upright
    count = iter(range(1, 100))

    def decoding(frame: object) -> torch.Tensor:
        if next(count) == 3:
            third.set()
        return upright(frame)

    def segmenting(image: torch.Tensor) -> Segmentation:
        assert third.wait(20)
        return segment(image)

    monkeypatch.setattr(frames, "_upright", decoding)
    monkeypatch.setattr(model, "segment", segmenting)
    outcome = clips(model).run(0, Picture(write_video(tmp_path / "a.mp4", 5), tmp_path, "a"), lambda *_: None)
    assert outcome.error is None


def test_up_to_date_and_overwritten(model: CATSeg, tmp_path: Path) -> None:
    clip = Picture(write_video(tmp_path / "a.mp4", 3), tmp_path / "out", "a")

    def seconds(**options: object) -> float | None:
        outcome = clips(model, **options).run(0, clip, lambda *_: None)
        assert outcome.error is None
        return outcome.seconds

    assert seconds() is not None
    assert seconds() is None
    assert seconds(overwrite=True) is not None
    assert seconds(every=2) is not None
    assert len(list((tmp_path / "out/a.labels").iterdir())) == 2
    (tmp_path / "out/a.labels/000002.png").unlink()
    assert seconds(every=2) is not None


def test_a_truncated_video_keeps_its_frames(model: CATSeg, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 40, movflags="faststart")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    clip = Picture(path, tmp_path / "out", "a")
    outcome = clips(model, every=4).run(0, clip, lambda *_: None)
    assert isinstance(outcome.error, ValueError)
    assert f"{path}: cut short or damaged after " in str(outcome.error)
    assert " of 40 frames" in str(outcome.error)
    kept = len(list((tmp_path / "out/a.labels").iterdir()))
    assert 3 <= kept < 10
    content = json.loads((tmp_path / "out/a.json").read_text())
    assert (content["complete"], content["frames"]) == (False, kept)
    assert len(decoded(tmp_path / "out/a.overlay.mp4")) == kept
    assert clips(model, every=4).run(0, clip, lambda *_: None).error is not None  # it is retried


def test_an_interrupted_run_keeps_its_frames(
    model: CATSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Picture(write_video(tmp_path / "a.mp4"), tmp_path / "out", "a")
    answers: Iterator[int] = iter(range(5))
    segment = model.segment

    def interrupted(image: torch.Tensor) -> object:
        if next(answers, None) is None:
            raise KeyboardInterrupt
        return segment(image)

    with monkeypatch.context() as patch:
        patch.setattr(model, "segment", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clips(model).run(0, clip, lambda *_: None)
    assert len(labels_in(tmp_path / "out/a.labels")) == 5
    assert len(decoded(tmp_path / "out/a.overlay.mp4")) == 5
    assert clips(model).run(0, clip, lambda *_: None).seconds is not None


def test_bad_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(FileNotFoundError, match=r"no such file: .*a\.mp4"):
        open_frames(path)
    path.write_bytes(b"no video at all" * 100)
    with pytest.raises(ValueError, match=r"a\.mp4: cannot read the video \(.*is the file whole\?"):
        open_frames(path)
    content = write_video(path, 40).read_bytes()
    path.write_bytes(content[: len(content) // 2])  # its index, at the end, is lost
    with pytest.raises(ValueError, match=r"a\.mp4: cannot read the video"):
        open_frames(path)
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="there is no video stream in it"):
        open_frames(sound)
    with pytest.raises(ValueError, match="every: 0 is not positive"):
        open_frames(path, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        open_frames(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r"PyAV: pip install 'catseg-fast\[video\]'"):
        open_frames(path)


def test_frames_of_several_sizes(model: CATSeg, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, size in enumerate([(40, 30), (40, 30), (30, 40)]):
        Image.new("RGB", size, "red").save(folder / f"{index}.png")
    outcome = clips(model).run(0, Picture(folder, tmp_path / "out", "frames"), lambda *_: None)
    assert str(outcome.error) == (
        f"{folder / '2.png'}: expected a frame of 40x30 pixels as the first one, got 30x40"
    )
    assert sorted(labels_in(tmp_path / "out/frames.labels")) == ["000000", "000001"]


def test_pixels_of_no_class(model: CATSeg, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    images = [frame.transpose(2, 0, 1) for frame in decoded(path)]
    threshold = float(model.segment(images[0]).scores.median())
    outcome = clips(model, min_score=threshold).run(0, Picture(path, tmp_path, "b"), lambda *_: None)
    assert outcome.error is None
    expected = [model.segment(frame, min_score=threshold).labels for frame in images]
    for found, labels in zip(labels_in(tmp_path / "b.labels").values(), expected, strict=True):
        np.testing.assert_array_equal(found, labels.numpy().astype(np.uint16))
    content = json.loads((tmp_path / "b.json").read_text())
    none = content["classes"][-1]
    assert (none["index"], content["unlabelled_value"]) == (-1, 65535)
    assert none["share"] == pytest.approx((torch.stack(expected) == -1).double().mean().item())


def test_totals() -> None:
    totals = Totals(["a", "b", "c"])
    totals.add(torch.tensor([[0, 2], [2, -1]]), torch.tensor([[0.5, 0.25], [0.75, 0.1]]))
    totals.add(torch.tensor([[0]]), torch.tensor([[1.0]]))
    assert totals.summary() == [
        {"index": 0, "name": "a", "share": 0.4, "mean_score": 0.75},
        {"index": 1, "name": "b", "share": 0.0, "mean_score": None},
        {"index": 2, "name": "c", "share": 0.4, "mean_score": 0.5},
    ]
    assert [entry["name"] for entry in totals.summary(0.1)] == ["a", "c"]
    totals.with_none = True
    none = totals.summary(0.3)[-1]
    assert (none["index"], none["share"], none["mean_score"]) == (-1, 0.2, pytest.approx(0.1))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(Path("clip.mp4"), 4)
    Path("frames").mkdir()
    for index in range(3):
        image = picture(30, 40, f"frame {index}").byte().permute(1, 2, 0).numpy()
        Image.fromarray(image).save(f"frames/{index}.png")
    Image.fromarray(image).save("clip.png")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["segment", *arguments, "--classes", "sky; tree", "--whole"])
        output = result.output.replace("\n", " ")
        return f"{result.exit_code}: {output}"

    assert run("clip.mp4", "frames", "clip.png", "--video", "--every", "2").startswith("0: ")
    assert {path.name for path in Path("segmented").iterdir()} == {
        "clip.json", "clip.labels", "clip.overlay.mp4", "clip-2.json", "clip-2.labels.png",
        "clip-2.overlay.png", "frames.json", "frames.labels", "frames.overlay.mp4",
    }  # fmt: skip
    assert run("clip.mp4", "frames", "clip.png", "--video", "--every", "2").count("up to date") >= 3
    assert run("clip.png", "--every", "2").startswith("1: ")
    assert "--every: there is no video" in run("clip.png", "--every", "2")
    assert "--top-k: clip.mp4 is a video" in run("clip.mp4", "--top-k", "2")
    Path("bad.mp4").write_text("no video")
    answer = run("bad.mp4", "clip.png")
    assert answer.startswith("1: ")
    assert "bad.mp4: cannot read the video" in answer
    assert "1 of 2 images failed" in answer
