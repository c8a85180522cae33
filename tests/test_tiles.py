"""Large pictures in tiles: equal to the same tiles segmented by hand, resumable, and in bounded memory."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from catseg_fast import CATSeg
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.labelling import Labelling
from catseg_fast.cli.main import app
from catseg_fast.cli.tiles import Tiles
from catseg_fast.data.raster import open_raster
from catseg_fast.inference.tiles import MemoryStore, TileGrid, default_overlap, label_bands
from catseg_fast.output.ownership import Owner, is_result, owner_of
from catseg_fast.output.results import summarise
from catseg_fast.reference.inference import SlidingWindow
from support.disk import small_disk
from support.tiny import picture, tiny_model

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SIZE = (130, 100)
WINDOW = SlidingWindow(48, 0.25, (80, 80))


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", sliding_window=False, window=WINDOW)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return picture(*SIZE).byte()


def save(path: Path, image: Tensor, **options: Any) -> Path:
    options = {"driver": "GTiff", "count": len(image), "dtype": str(image.dtype)[6:], **options}
    height, width = image.shape[1:]
    with rasterio.open(path, "w", height=height, width=width, **options) as dataset:
        dataset.write(image.numpy())
    return path


def by_hand(model: CATSeg, image: Tensor, tile: int, overlap: int, sliding: bool | None) -> Tensor:
    """Average the probabilities `[T, H, W]` of tiles that are segmented one by one."""
    grid = TileGrid((image.shape[1], image.shape[2]), tile, overlap)
    height, width = grid.shape
    total = torch.zeros(len(model.label_classes), *grid.size)
    count = torch.zeros(grid.size)
    for top in grid.tops:
        for left in grid.lefts:
            answer = model.segment(
                image[:, top : top + height, left : left + width], sliding_window=sliding, keep_logits=True
            )
            rows, columns = slice(top, top + height), slice(left, left + width)
            for index in range(len(total)):
                total[index, rows, columns] += answer.score_map(index)
            count[rows, columns] += 1
    return total / count


@pytest.mark.parametrize("tile", [64, 80, 110, 200])
@pytest.mark.parametrize(("length", "overlap"), [(64, 0), (130, 0), (131, 32), (300, 7), (1, 0)])
def test_tiles_cover_a_picture(tile: int, length: int, overlap: int) -> None:
    grid = TileGrid((length, 10), tile, overlap)
    side, tops = grid.shape[0], grid.tops
    assert tops[0] == 0
    assert tops[-1] + side == length
    assert all(0 < b - a <= side - overlap for a, b in pairwise(tops))
    assert grid.count == len(tops)


@pytest.mark.parametrize(
    ("tile", "overlap", "sliding"),
    [(64, 16, False), (60, 30, None), (64, 0, False), (90, 30, True), (200, 20, False)],
)
def test_equal_to_tiles_by_hand(
    model: CATSeg, image: Tensor, tile: int, overlap: int, sliding: bool | None
) -> None:
    answer = model.segment(image, tiles=tile, overlap=overlap, sliding_window=sliding)
    scores, labels = by_hand(model, image, tile, overlap, sliding).max(dim=0)
    assert torch.equal(answer.scores, scores)
    assert torch.equal(answer.labels, labels.int())
    assert answer.overlay(legend=False).size == SIZE[::-1]


def test_one_tile_is_the_picture(model: CATSeg, image: Tensor) -> None:
    answer, plain = model.segment(image, tiles=200), model.segment(image)
    assert torch.equal(answer.labels, plain.labels)
    assert torch.equal(answer.scores, plain.scores)
    assert default_overlap(200) == 25


def test_memory_does_not_grow_with_the_picture(model: CATSeg) -> None:
    """Each tile is read once, and only logits that the next band of tiles needs are kept."""
    image, grid = picture(260, 64).byte(), TileGrid((260, 64), 64, 16)
    read, kept = [], []

    def read_window(top: int, left: int, height: int, width: int) -> Tensor:
        read.append((top, left, height, width))
        return image[:, top : top + height, left : left + width]

    store = MemoryStore()
    for _ in label_bands(model, grid, read_window, store):
        kept.append(len(store._kept))
    assert read == [(top, 0, 64, 64) for top in grid.tops]
    assert len(read) == 6
    assert max(kept) <= 3


def test_folds_and_a_threshold(image: Tensor) -> None:
    classes = {"sky": ["sky"], "things": ["wall", "tree"], "floor": "floor"}
    model = tiny_model("v2", classes, sliding_window=False, window=WINDOW)
    maps = by_hand(tiny_model("v2", ("sky", "wall", "tree", "floor"), sliding_window=False, window=WINDOW),
                   image, 64, 16, False)  # fmt: skip
    scores, labels = torch.stack([maps[0], maps[1:3].amax(dim=0), maps[3]]).max(dim=0)
    threshold = float(scores.median())
    answer = model.segment([image], tiles=64, overlap=16, min_score=threshold)[0]
    assert torch.equal(answer.scores, scores)
    assert torch.equal(answer.labels, labels.int().masked_fill(scores < threshold, -1))
    assert answer.classes == ("sky", "things", "floor")


def test_bad_arguments(model: CATSeg, image: Tensor) -> None:
    with pytest.raises(ValueError, match="tiles: 47 is smaller than the model's window of 48 pixels"):
        model.segment(image, tiles=47)
    for overlap in (33, -1):
        with pytest.raises(ValueError, match=rf"overlap: {overlap} is not in 0\.\.32, half of a tile of 64"):
            model.segment(image, tiles=64, overlap=overlap)
    with pytest.raises(ValueError, match="overlap: 3 without tiles"):
        model.segment(image, overlap=3)
    for options in ({"top_k": 2}, {"keep_logits": True}):
        with pytest.raises(ValueError, match="tiles: not with an encoded picture, top_k or keep_logits"):
            model.segment(image, tiles=64, **options)  # type: ignore[call-overload]


def test_windows_of_a_raster(tmp_path: Path) -> None:
    image = picture(40, 30).byte()
    files = [
        (save(tmp_path / "tiled.tif", image, tiled=True, blockxsize=16, blockysize=16), image),
        (save(tmp_path / "a.png", image, driver="PNG"), image),
        (save(tmp_path / "grey.tif", image[:1]), image[:1].expand(3, -1, -1)),
        (save(tmp_path / "four.tif", torch.cat([image, image[:1]])), image),
    ]
    sixteen = save(tmp_path / "sixteen.tif", image[:1].to(torch.uint16) * 257)
    files.append((sixteen, image[:1].expand(3, -1, -1)))
    Image.fromarray(image.permute(1, 2, 0).numpy()).quantize(8).save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as palette:
        colours = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    files.append((tmp_path / "palette.png", colours))
    for path, expected in files:
        with open_raster(path) as raster:
            assert raster.size == (40, 30)
            window = raster.read(7, 3, 20, 11)
            assert window.dtype == torch.uint8
            assert torch.equal(window, expected[:, 7:27, 3:14]), path
            blocks = expected[:, :39, :30].reshape(3, 13, 3, 10, 3).float().mean(dim=(2, 4))
            assert torch.equal(raster.preview(3), blocks.round().byte())


def test_rasters_that_cannot_be_read(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"no such file: .*none\.tif"),
        open_raster(tmp_path / "none.tif"),
    ):
        pass
    (tmp_path / "bad.tif").write_text("no raster")
    with (
        pytest.raises(ValueError, match=r"bad\.tif: cannot read the raster: expected"),
        open_raster(tmp_path / "bad.tif"),
    ):
        pass
    floats = save(tmp_path / "floats.tif", torch.zeros(1, 4, 4))
    expected = "expected bands of uint8 or uint16 values, got float32; scale it"
    with pytest.raises(ValueError, match=expected), open_raster(floats):
        pass
    remote = tmp_path / "remote.vrt"
    remote.write_text('<VRTDataset rasterXSize="1" rasterYSize="1"></VRTDataset>')
    with pytest.raises(ValueError, match="cannot read the raster"), open_raster(remote):
        pass


def tiles(model: CATSeg, **options: Any) -> Tiles:
    asked = Labelling(model, min_score=options.pop("min_score", None))
    return Tiles(model, asked, {"fingerprint": "f"}, 64, 16, **options)


def test_files_are_the_answer(model: CATSeg, image: Tensor, tmp_path: Path) -> None:
    transform = rasterio.Affine(0.5, 0, 4000, 0, -0.5, 9000)
    path, out = save(tmp_path / "a.tif", image, crs="EPSG:32632", transform=transform), tmp_path / "out"
    seen: list[tuple[int, int]] = []
    outcome = tiles(model).run(0, Picture(path, out, "a"), lambda *done: seen.append(done))
    assert outcome.error is None
    assert (seen[0], seen[-1]) == ((0, 6), (6, 6))
    expected = model.segment(image, tiles=64, overlap=16)
    with rasterio.open(out / "a.labels.tif") as labels:
        np.testing.assert_array_equal(labels.read(1), expected.labels.numpy())
        assert labels.crs == "EPSG:32632"
        assert labels.transform == transform
    content = json.loads((out / "a.json").read_text())
    found = [(entry["name"], entry["share"], entry["mean_score"]) for entry in content["classes"]]
    for entry, (name, share, score) in zip(summarise(expected), found, strict=True):
        assert (name, share) == (entry["name"], pytest.approx(entry["share"]))
        assert score == pytest.approx(entry["mean_score"])
    assert {file.name for file in out.iterdir() if file.suffix != ".lock"} == {
        "a.json", "a.labels.tif", "a.overlay.png",
    }  # fmt: skip
    assert owner_of(out, "a", path) is Owner.THIS_PICTURE
    assert is_result(out / "a.labels.tif")
    assert tiles(model).run(0, Picture(path, out, "a"), lambda *_: None).seconds is None
    assert tiles(model, overwrite=True).run(0, Picture(path, out, "a"), lambda *_: None).seconds is not None


def test_pixels_of_no_class(model: CATSeg, image: Tensor, tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", image)
    threshold = float(model.segment(image, tiles=64, overlap=16).scores.median())
    outcome = tiles(model, min_score=threshold).run(0, Picture(path, tmp_path, "b"), lambda *_: None)
    assert outcome.error is None
    expected = model.segment(image, tiles=64, overlap=16, min_score=threshold)
    with rasterio.open(tmp_path / "b.labels.tif") as labels:
        found = labels.read(1)
    np.testing.assert_array_equal(found, expected.labels.numpy().astype(np.uint16))
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["classes"][-1]["share"] == pytest.approx((found == 65535).mean())


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_run_goes_on(
    model: CATSeg, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """It continues with the tile after the last finished one, to the same result."""
    path, calls = save(tmp_path / "a.tif", image), []
    encode = model.encode_images

    def interrupted(*args: Any) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiles(model).run(0, Picture(path, tmp_path / "out", "a"), lambda *_: None)
    assert not (tmp_path / "out/a.json").exists()
    state = tmp_path / "out/.a.tiles"
    with (state / "labels.raw").open("ab") as file:
        file.write(b"what a killed run has begun to write")
    calls.clear()
    monkeypatch.setattr(model, "encode_images", lambda *args: calls.append(1) or encode(*args))
    outcome = tiles(model).run(0, Picture(path, tmp_path / "out", "a"), lambda *_: None)
    assert outcome.error is None
    assert len(calls) == 6 - stop
    with rasterio.open(tmp_path / "out/a.labels.tif") as labels:
        expected = model.segment(image, tiles=64, overlap=16)
        np.testing.assert_array_equal(labels.read(1), expected.labels.numpy())
    assert not state.exists()


def test_what_was_begun_with_other_settings_is_not_used(
    model: CATSeg, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.tif", image)
    with monkeypatch.context() as patch:
        patch.setattr(Tiles, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        outcome = tiles(model).run(0, Picture(path, tmp_path / "out", "a"), lambda *_: None)
        assert "No space left" in str(outcome.error)
    assert (tmp_path / "out/.a.tiles/labels.raw").stat().st_size == 2 * SIZE[0] * SIZE[1]
    save(path, image.flip(2))
    assert tiles(model).run(0, Picture(path, tmp_path / "out", "a"), lambda *_: None).error is None
    with rasterio.open(tmp_path / "out/a.labels.tif") as labels:
        expected = model.segment(image.flip(2), tiles=64, overlap=16)
        np.testing.assert_array_equal(labels.read(1), expected.labels.numpy())


def test_a_truncated_raster_says_so_and_keeps_its_tiles(model: CATSeg, image: Tensor, tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", image, compress="deflate", blockysize=8)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    outcome = tiles(model).run(0, Picture(path, tmp_path / "out", "a"), lambda *_: None)
    assert isinstance(outcome.error, ValueError)
    assert "a.tif: cannot read" in str(outcome.error)


def test_a_killed_removal_does_not_block_the_next_run(model: CATSeg, image: Tensor, tmp_path: Path) -> None:
    """The state of an unfinished picture appears and disappears atomically; files of others stay."""
    path, out = save(tmp_path / "a.tif", image), tmp_path / "out"
    tiles, clip = Tiles(model, Labelling(model), {"fingerprint": "f"}, 64, 16), Picture(path, out, "a")
    assert tiles.run(0, clip, lambda *_: None).error is None
    work = out / ".a.tiles"
    work.mkdir()
    (work / "state.json").write_text("{}")
    assert tiles.run(0, clip, lambda *_: None).seconds is None  # killed after the results were in place
    assert not work.exists()
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    assert tiles.run(0, clip, lambda *_: None).seconds is None
    assert (work / "notes.txt").read_text() == "mine"


def test_a_full_disk(model: CATSeg, image: Tensor, tmp_path: Path) -> None:
    """It is said, at any byte, and the next run continues."""
    path, labels = save(tmp_path / "a.tif", image), np.arange(130 * 100, dtype=np.uint16).reshape(SIZE)
    with open_raster(path) as raster:
        raster.write_labels(tmp_path / "whole.tif", labels, "x")
        size = (tmp_path / "whole.tif").stat().st_size
        for most in (0, 1000, size // 2, size - 1000, size - 100, size - 1):
            with small_disk(most), pytest.raises(OSError, match=r"part\.tif: cannot write the label map"):
                raster.write_labels(tmp_path / "part.tif", labels, "x")
            (tmp_path / "part.tif").unlink()
        with small_disk(size):
            raster.write_labels(tmp_path / "part.tif", labels, "x")
    tiles, out = Tiles(model, Labelling(model), {"fingerprint": "f"}, 64, 16), tmp_path / "out"
    with small_disk(100_000):
        outcome = tiles.run(0, Picture(path, out, "a"), lambda *_: None)
    assert isinstance(outcome.error, OSError)
    assert not [entry.name for entry in out.iterdir() if entry.name[0] != "."]
    assert tiles.run(0, Picture(path, out, "a"), lambda *_: None).error is None


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("aerial.tif"), picture(400, 420).byte())

    def run(*arguments: str) -> str:
        command = ["segment", *arguments, "--classes", "sky; tree", "--whole", "--device", "cpu"]
        result = CliRunner().invoke(app, command)
        return f"{result.exit_code}: {result.output}"

    assert run("aerial.tif", "--tiles", "400", "--overlap", "200").startswith("0: ")
    with rasterio.open("segmented/aerial.labels.tif") as labels:
        assert labels.shape == (400, 420)
    assert "up to date" in run("aerial.tif", "--tiles", "400", "--overlap", "200")
    assert "up to date" not in run("aerial.tif", "--tiles", "400")
    answer = run("aerial.tif", "--tiles", "100")
    assert answer.startswith("1: ")
    assert "tiles: 100 is smaller than the model's window of 384 pixels" in " ".join(answer.split())
    answer = run("aerial.tif", "--tiles", "400", "--overlap", "300")
    assert "overlap: 300 is not in 0..200" in " ".join(answer.split())
    assert run("aerial.tif", "--overlap", "3").startswith("2: ")
    assert run("aerial.tif", "--tiles", "400", "--format", "masks").startswith("2: ")
