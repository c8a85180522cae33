"""kill -9 before every change of files that a writer makes: what is there is whole, the next call goes on.

Each test compares with what the same calls leave without a kill.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from catseg_fast.checkpoints.checkpoint import read_checkpoint
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.labelling import Labelling
from catseg_fast.cli.tiles import Tiles
from catseg_fast.cli.video import Clips
from catseg_fast.data.folder import FolderDataset
from catseg_fast.data.published import import_dataset
from catseg_fast.data.scenes import write_dataset
from catseg_fast.export import graph as export
from catseg_fast.identity import result_digest
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.labels import NONE_NAME
from catseg_fast.reference.inference import SlidingWindow
from catseg_fast.text import features_cache
from catseg_fast.text.features_cache import FeaturesCache
from catseg_fast.training.trainer import Trainer
from support.command_line import run as command
from support.command_line import save_tiny_checkpoint
from support.data_sets import add, make_dataset
from support.kill_points import Content, kill_everywhere
from support.tiny import V2, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

slow = pytest.mark.slow
# What was done before a call B that is killed, and what is done afterwards.
CALLS = [
    ("nothing", "B"),
    ("A", "A"),
    *(pytest.param(*x, marks=slow) for x in (("nothing", "A"), ("A", "B"))),
]
COPIES = ((True, True), (False, True))
TIMES = ("seconds", "seconds_median", "crc32", "environment", "date")  # what differs from run to run


def call(*arguments: object) -> None:
    """Run a command, which must succeed."""
    result = command(*arguments)
    assert result.exit_code == 0, result.output


def nothing() -> None:
    """No work."""


def content_of(folder: Path) -> Content:
    """The files in a folder, apart from times and locks."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() and not path.name.endswith(".lock") and "tensorboard" not in path.parts
    }


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".safetensors":  # whose metadata are in another order each time
        return {name: tensor.tolist() for name, tensor in read_checkpoint(path).items()}
    if path.suffix == ".pt":
        return _plain(torch.load(path, weights_only=True))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _plain(value: Any) -> Any:
    """The same with bytes in the place of tensors."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.numpy().tobytes() if isinstance(value, Tensor) else value


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(params=[8, pytest.param(1, marks=slow)], ids=["some", "all"])
def every(request: pytest.FixtureRequest) -> int:
    """Of the writers that take long, some kills: before each so many changes."""
    return int(request.param)


# ---- segment and eval -------------------------------------------------------------------------------------


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

    table = kill_everywhere(
        nothing if before == "nothing" else first, second, second if last == "B" else first, out,
        content_of, vouched, every,
    )  # fmt: skip
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

    again = first if last == "A" else resumed if before == "nothing" else second
    table = kill_everywhere(
        nothing if before == "nothing" else first, second, again, out, content_of, evaluated, every
    )  # fmt: skip
    print("eval", before, last, table)
    assert table.points * every > 30
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

    first, second = (segment(*names) for names in VOCABULARIES.values())
    table = kill_everywhere(
        nothing if before == "nothing" else first, second, second if last == "B" else first, out,
        content_of, vouched,
    )  # fmt: skip
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

    first, second = (segment(*names) for names in VOCABULARIES.values())
    table = kill_everywhere(
        nothing if before == "nothing" else first, second, second if last == "B" else first, out,
        content_of, vouched, every,
    )  # fmt: skip
    print("tiles", before, last, table)
    assert table.points * every > 20
    assert table.states.keys() <= {"", "new", *(["old"] if before == "A" else [])}


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

    table = kill_everywhere(
        nothing if before == "nothing" else load(0), load(1), load(last == "B"), out, content_of, imported
    )  # fmt: skip
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

    old, new = write("old"), write("new")
    table = kill_everywhere(
        nothing if before == "nothing" else old, new, new if last == "B" else old, out, _without_npz, check
    )  # fmt: skip
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

    again = first if last == "A" else resumed if before == "nothing" else second
    table = kill_everywhere(
        nothing if before == "nothing" else first, second, again, out, content_of, every=every
    )
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
