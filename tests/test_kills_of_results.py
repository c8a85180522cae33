"""kill -9 before every change of files of `segment` and `eval`: results are whole, the next call continues.

Each test compares with what the same calls leave without a kill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.labelling import Labelling
from catseg_fast.cli.tiles import Tiles
from catseg_fast.cli.video import Clips
from catseg_fast.identity import result_digest
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.labels import NONE_NAME
from catseg_fast.reference.inference import SlidingWindow
from support.data_sets import add, make_dataset
from support.kill_calls import CALLS, call, content_of, in_turn
from support.kill_points import kill_everywhere
from support.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Model:
    """In the place of a model; each pixel's class follows from its colour."""

    sliding_window = False
    max_classes = None
    dtype = torch.float32
    fold = None
    variant = SimpleNamespace(name="fake")

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = self.label_classes = classes

    def segment(self, image: Tensor, **_: object) -> Segmentation:
        labels = (image.sum(0) % len(self.classes)).to(torch.int32)
        return Segmentation(labels, torch.ones(labels.shape), self.classes)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weights": torch.ones(3)}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two pictures in a working directory, and a model that costs nothing."""
    monkeypatch.chdir(tmp_path)
    root = make_dataset(tmp_path / "data")
    add(root, "bb", np.array([[0, 1, 2], [1, 1, 0]], dtype=np.uint8))
    for name in ("segment", "eval"):
        monkeypatch.setattr(f"catseg_fast.cli.{name}.build_model", lambda *args, **_: Model(tuple(args[2])))
    return root


VOCABULARIES = {"old": ("old", "tree", "sea"), "new": ("new", "rock", "mud", "sun")}


def vouched(folder: Path) -> str:
    """Check that each result vouches for the files beside it."""
    kinds = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and "identity" in result:
            files = result["identity"]["files"]
            assert files == {name: result_digest(folder / name) for name in files}, path
            names = {entry["name"] for entry in result["classes"]} - {NONE_NAME}
            (kind,) = (kind for kind, known in VOCABULARIES.items() if names <= set(known))
            kinds.append(kind)
    return " ".join(kinds)


A, B = (("--classes", "; ".join(names)) for names in VOCABULARIES.values())


@pytest.mark.parametrize(("before", "last"), CALLS)
def test_segment(every: int, last: str, before: str, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("segment", "data/images", "-o", out, "--device", "cpu", "--format", "palette")

    def first() -> None:
        call(*common, *A, "--format", "masks", "--stats", out / "stats.json")

    def second() -> None:
        call(*common, *B, "--stats", out / "stats.json")

    table = kill_everywhere(*in_turn(before, last, first, second), out, content_of, vouched, every)
    print("segment", before, last, table)
    expected = {"", "new", "new new"} if before == "nothing" else {"old old", "new new"}
    assert table.states.keys() >= expected or every > 1
    assert table.points * every > 30


def evaluated(folder: Path) -> str:
    """Check that there are no label maps of another evaluation beside the results."""
    if not (folder / "results.json").exists():
        return "no results"
    results = json.loads((folder / "results.json").read_text())
    maps = {path: np.array(Image.open(path)) for path in (folder / "torch-float32.labels").iterdir()}
    assert max(array.max() for array in maps.values()) == len(results["classes"]) - 1
    return f"{len(results['classes'])} classes"


@pytest.mark.parametrize(("before", "last"), CALLS)
def test_eval(every: int, last: str, before: str, pictures: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "out", tmp_path / "names.txt"
    names.write_text("sky\ntree\nhouse\nsea\n")
    common = ("eval", "--data", "data", "-o", out, "--device", "cpu", "--whole", "--restart")
    common += ("--backend", "torch", "--backend", "reference")

    def first() -> None:
        call(*common)

    def second() -> None:
        call(*common, "--classes-file", names)

    def resumed() -> None:
        call(*common[:8], *common[9:], "--classes-file", names)

    works = in_turn(before, last, first, second, resumed)
    table = kill_everywhere(*works, out, content_of, evaluated, every)
    print("eval", before, last, table)
    assert table.points * every > 25
    assert table.states.keys() <= {"no results", "4 classes", "3 classes"}


def _decided(image: Tensor, classes: Sequence[str]) -> Tensor:
    """Logits `[1, T, H, W]` of pixels, which cost nothing."""
    shift = sum(map(ord, classes[0]))
    return torch.stack([(image.sum(0) * (index + 1) + shift) % 17 - 8.0 for index in range(len(classes))])[
        None
    ].float()


@pytest.mark.parametrize(("before", "last"), CALLS)
def test_video(last: str, before: str, tmp_path: Path) -> None:
    """Frames that are done are not segmented again, whatever is killed."""
    av = pytest.importorskip("av", reason="needs the extra: video")
    out, path = tmp_path / "out", tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for grey in (0, 60, 200):
            frame = np.full((16, 32, 3), grey, np.uint8)
            frame[:8, :16] = 255 - grey
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))

    def segment(*names: str) -> Callable[[], None]:
        def work() -> None:
            model = Labelling(Model(names), min_score=0.5)  # type: ignore[arg-type]
            clips = Clips(model, names, {"fingerprint": names[0]}, threads=1)
            outcome = clips.run(0, Picture(path, out, "clip"), lambda *_: None)
            assert outcome.error is None, outcome.error

        return work

    works = in_turn(before, last, *(segment(*names) for names in VOCABULARIES.values()))
    table = kill_everywhere(*works, out, content_of, vouched)
    print("video", before, last, table)
    assert table.points > 10
    assert table.states.keys() <= {"", "new", *(["old"] if before == "A" else [])}


@pytest.mark.parametrize(("before", "last"), CALLS)
def test_tiles(every: int, last: str, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rasterio", reason="needs the extra: tiles")
    out, path = tmp_path / "out", tmp_path / "large.png"
    pixels = np.arange(84 * 50 * 3, dtype=np.uint32).reshape(84, 50, 3) // 7
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    window = SlidingWindow(48, 0.25, (80, 80))
    monkeypatch.setattr(
        "catseg_fast.inference.tiles._tile_logits",
        lambda model, pixels, readout: _decided(pixels.long(), model.classes),
    )

    def segment(*names: str) -> Callable[[], None]:
        model = tiny_model("v2", names, sliding_window=False, window=window)

        def work() -> None:
            tiles = Tiles(model, Labelling(model), {"fingerprint": names[0]}, 48, 12)
            outcome = tiles.run(0, Picture(path, out, "large"), lambda *_: None)
            assert outcome.error is None, outcome.error

        return work

    works = in_turn(before, last, *(segment(*names) for names in VOCABULARIES.values()))
    table = kill_everywhere(*works, out, content_of, vouched, every)
    print("tiles", before, last, table)
    assert table.points * every > 20
    assert table.states.keys() <= {"", "new", *(["old"] if before == "A" else [])}
