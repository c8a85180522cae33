"""Large pictures: memory that stays bounded, whatever their size."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg
from catseg_fast.ahead import Room, ahead
from catseg_fast.cli import batch
from catseg_fast.cli.batch import Batch
from catseg_fast.cli.inputs import Picture
from catseg_fast.inference import decoding, encoding
from catseg_fast.inference.images import load_image
from catseg_fast.inference.readout import Readout
from catseg_fast.output import strips
from catseg_fast.output.overlay import overlay
from catseg_fast.output.results import summarise
from catseg_fast.reference.inference import resize
from support.tiny import picture, tiny_model


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", sliding_window=False)


def test_room_is_for_one_large_or_several_small() -> None:
    room = Room(10)
    assert room.take(25)
    assert not room.take(1)
    room.leave(25)
    assert room.take(6)
    assert room.take(4)
    assert not room.take(1)
    room.leave(6)
    assert room.take(6)


@pytest.mark.parametrize("size", [1, 7, 10, 100])
def test_what_runs_ahead_stays_within_its_room(size: int) -> None:
    sizes = [3, 4, 9, 12, 1, 1, 1, 1, 30, 2, 5]
    lock = threading.Lock()
    present, most = [0], [0]

    def work(item: int) -> int:
        with lock:
            present[0] += item
            most[0] = max(most[0], present[0])
        return item

    done = []
    with ThreadPoolExecutor(3) as pool:
        for job in ahead(pool, work, sizes, 3, lambda item: item, Room(size)):
            done.append(job.result())
            present[0] -= done[-1]
    assert done == sizes
    assert most[0] <= max(30, size)
    if size == 1:
        assert most[0] == 30  # never two at a time


def pictures(folder: Path, sizes: list[tuple[int, int]]) -> list[Picture]:
    found = []
    for index, (height, width) in enumerate(sizes):
        path = folder / f"{index}.png"
        Image.fromarray(picture(height, width, str(index)).byte().permute(1, 2, 0).numpy()).save(path)
        found.append(path)
    return [Picture(path, folder / "out", path.stem) for path in found]


SIZES = [(20, 30), (50, 80), (20, 31), (60, 90), (60, 91), (10, 10), (21, 30)]


@pytest.mark.parametrize(("room", "size"), [(1, 1), (1000, 1), (1000, 3), (4000, 2), (10_000, 4)])
def test_any_room_gives_the_same_files(room: int, size: int, model: CATSeg, tmp_path: Path) -> None:
    """Large pictures are read twice and written separately: the results must be the same."""
    found = pictures(tmp_path, SIZES)
    written: list[dict[str, Any]] = []
    for options in ({"size": size}, {"size": size, "room": room}):
        work = Batch(model, {"fingerprint": "x"}, overwrite=True, threads=2, **options)  # type: ignore[arg-type]
        outcomes = list(work.run(found))
        assert [outcome.error for outcome in outcomes] == [None] * len(SIZES)
        assert sorted(outcome.index for outcome in outcomes) == list(range(len(SIZES)))
        assert work.room.used == 0
        content = {}
        for outcome in outcomes:
            content[outcome.index] = [
                np.array(Image.open(outcome.picture.result(kind))) for kind in ("labels.png", "overlay.png")
            ]
            data = json.loads(outcome.picture.result("json").read_text())
            assert [entry for entry in data["classes"] if entry["share"]] == outcome.summary
        written.append(content)
    for index in range(len(SIZES)):
        for first, second in zip(written[0][index], written[1][index], strict=True):
            assert (first == second).mean() > 0.999  # a batch rounds differently


def test_large_pictures_come_one_by_one(
    model: CATSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a picture is decoded, segmented or written, no other one is in memory."""
    found = pictures(tmp_path, SIZES)
    alive: set[int] = set()
    together: list[set[int]] = []
    lock = threading.Lock()
    decode, large, write = Batch._decode, Batch._large, Batch._write

    def note(index: int) -> None:
        with lock:
            alive.add(index)
            together.append(set(alive))

    def noted_decode(self: Batch, job: Any) -> Any:
        note(job.index)
        return decode(self, job)

    def noted_large(self: Batch, job: Any, decoded: Any) -> Any:
        note(job.index)
        try:
            return large(self, job, decoded)
        finally:
            alive.remove(job.index)

    def noted_write(self: Batch, picture: Picture, *arguments: Any) -> Any:
        try:
            return write(self, picture, *arguments)
        finally:
            alive.remove(int(picture.stem))

    monkeypatch.setattr(Batch, "_decode", noted_decode)
    monkeypatch.setattr(Batch, "_large", noted_large)
    monkeypatch.setattr(Batch, "_write", noted_write)
    list(Batch(model, {"fingerprint": "x"}, threads=3, room=2000).run(found))
    big = {index for index, (height, width) in enumerate(SIZES) if height * width > 2000}
    assert big == {1, 3, 4}
    assert all(len(group) == 1 for group in together if group & big)
    assert any(len(group) > 1 for group in together)  # small ones are still batched


def test_a_large_picture_that_cannot_be_read_does_not_stop_the_others(model: CATSeg, tmp_path: Path) -> None:
    found = pictures(tmp_path, SIZES)
    path = found[3].path
    path.write_bytes(path.read_bytes()[:1000])
    outcomes = list(Batch(model, {"fingerprint": "x"}, room=2000, max_pixels=5400).run(found))
    errors = {outcome.index: str(outcome.error) for outcome in outcomes if outcome.error}
    assert errors.keys() == {3, 4}
    assert "cannot read" in errors[3]
    assert "91x60 = 5,460 pixels" in errors[4]


def test_uint8_pictures_are_encoded_as_floats_are(model: CATSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(70, 50)
    for window in (None, model.window):
        readout = Readout((70, 50), window)
        expected = encoding._crops(image, readout, model)
        size = (model.variant.clip.input_size, model.variant.clip.input_size)
        for actual, truth in zip(encoding._crops(image.byte(), readout, model), expected, strict=True):
            torch.testing.assert_close(actual, resize(truth, size), rtol=0, atol=1e-5)
    whole = model.segment(image)
    monkeypatch.setattr("catseg_fast.model.LARGE_PIXELS", 1)
    large = model.segment(image.byte())
    torch.testing.assert_close(large.scores, whole.scores, rtol=0, atol=1e-5)
    assert (large.labels == whole.labels).float().mean() > 0.99


def test_strips_do_not_show(model: CATSeg, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, overlay and summary are the same with strips of a single row."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 7
    Image.open(photo).save(file, "PNG", exif=exif)
    answer = model.segment(photo)
    labels = answer.labels.repeat_interleave(30, 0).repeat_interleave(30, 1)
    image = load_image(photo).repeat_interleave(30, 1).repeat_interleave(30, 2)

    def results() -> list[Any]:
        picture = overlay(image, labels, answer.classes)
        return [load_image(photo), load_image(file.getvalue()), np.array(picture), summarise(answer)]

    whole = results()
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 1)
    monkeypatch.setattr(strips, "STRIP_PIXELS", 1)
    *maps, summary = results()
    assert all(np.array_equal(a, b) for a, b in zip(maps, whole, strict=False))
    for entry, expected in zip(summary, whole[-1], strict=True):
        assert entry["share"] == expected["share"]
        assert entry["mean_score"] == pytest.approx(expected["mean_score"], rel=1e-12)


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
sys.path.insert(0, TESTS)
from support.tiny import tiny_model
from catseg_fast.cli.batch import Batch
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.labelling import Labelling

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

model = tiny_model("v2", sliding_window=False)
small, large = (Path(FOLDER, name) for name in ("small.png", "large.png"))
Image.new("RGB", (640, 480), (200, 120, 40)).save(small)
def go(path, **options):
    work = Batch(Labelling(model, **options), {"fingerprint": "x"}, overwrite=True, room=1)
    (outcome,) = work.run([Picture(path, Path(FOLDER, "out"), path.stem)])
    assert outcome.error is None, outcome.error
go(small, **OPTIONS)
before = peak()
go(large, **OPTIONS)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize(
    ("options", "more"),
    [({"min_score": 0.5}, 0), pytest.param({"top_k": 2, "min_score": 0.5}, 20, marks=pytest.mark.slow)],
    ids=["labels", "best two"],
)
def test_peak_memory_by_pixel(options: dict[str, float], more: int, tmp_path: Path) -> None:
    """Less than 1.5 GiB for 16000 x 8000 pixels, measured at a quarter of them; once it was 50 bytes each.

    The two best classes of a pixel take 16 bytes more, and 4 in the file's types.
    """
    size = (8000, 4000)
    Image.new("RGB", size, (10, 160, 90)).save(tmp_path / "large.png", compress_level=1)
    values = {"FOLDER": str(tmp_path), "TESTS": str(Path(__file__).parent), "OPTIONS": options}
    code = functools.reduce(lambda text, name: text.replace(name, repr(values[name])), values, MEASURE)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) / (size[0] * size[1]) < 1.5 * 2**30 / (16000 * 8000) + more


def test_the_room_is_above_that_of_common_photos() -> None:
    assert batch.ROOM // (24 * 10**6) >= 4
