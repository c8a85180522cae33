"""Formats of other tools: every reader gets the label map; and helpers of `Segmentation`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from catseg_fast import CATSeg, Segmentation
from catseg_fast.cli.inputs import find_pictures
from catseg_fast.cli.main import app
from catseg_fast.errors import MissingPackageError
from catseg_fast.identity import read_png_mark
from catseg_fast.imports import require_pycocotools
from catseg_fast.inference.images import load_image
from catseg_fast.output.colours import palette
from catseg_fast.output.formats import FORMATS, Labelled, mask_name
from support.tiny import CLASSES, picture, tiny_model

pycocotools = pytest.importorskip("pycocotools.mask")

NAMES = ("sky", "tree, oak", "red car", "wall/door")


def blobs(height: int, width: int, classes: int = 4, seed: int = 0) -> np.ndarray:
    """Return a label map with many small areas, holes, and corners that touch."""
    coarse = np.random.default_rng(seed).integers(0, classes, (height // 2, width // 2))
    return coarse.repeat(2, 0).repeat(2, 1).astype(np.int32)


def labelled(labels: np.ndarray, names: tuple[str, ...] = NAMES) -> Labelled:
    return Labelled(labels, names, "photo.jpg", "mark")


def decoded(annotation: dict, height: int, width: int) -> np.ndarray:
    segments = annotation["segmentation"]
    if isinstance(segments, list):
        return pycocotools.decode(pycocotools.merge(pycocotools.frPyObjects(segments, height, width)))
    return pycocotools.decode(segments)


@pytest.mark.parametrize("kind", ["coco-rle", "coco-polygons"])
@pytest.mark.parametrize("size", [(2, 2), (10, 16), (60, 40)])
def test_coco_files_hold_the_label_map(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    labels = blobs(*size)
    labels[0, 0] = -1
    FORMATS[kind].write(tmp_path / "photo.json", labelled(labels))
    content = json.loads((tmp_path / "photo.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "photo.jpg", "width": size[1], "height": size[0]},
    ]
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    assert tuple(names.values()) == NAMES
    found = np.full(size, -1)
    for annotation in content["annotations"]:
        mask = decoded(annotation, *size).astype(bool)
        assert annotation["area"] == mask.sum() == (labels == annotation["category_id"] - 1).sum()
        rows, columns = mask.nonzero()
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width - 1, y + height - 1) == (
            columns.min(), rows.min(), columns.max(), rows.max(),
        )  # fmt: skip
        found[mask] = annotation["category_id"] - 1
    np.testing.assert_array_equal(found, labels)


def test_pycocotools_reads_the_file(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    FORMATS["coco-rle"].write(tmp_path / "photo.json", labelled(blobs(10, 16)))
    data = COCO(tmp_path / "photo.json")
    assert [data.cats[i]["name"] for i in data.getCatIds(catNms=["red car"])] == ["red car"]
    assert len(data.getAnnIds(imgIds=[1])) == 4


def test_the_palette_keeps_indices_and_colours(tmp_path: Path) -> None:
    labels = blobs(10, 16)
    labels[0, 0] = -1
    FORMATS["palette"].write(tmp_path / "a.png", labelled(labels))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), np.where(labels < 0, 255, labels))
        colours = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(colours[labels == 2][0], palette(NAMES)[2])


def test_masks_are_of_one_class_each(tmp_path: Path) -> None:
    labels = blobs(10, 16)
    labels[labels == 1] = 0
    FORMATS["masks"].write(tmp_path / "a.masks", labelled(labels))
    assert {path.name for path in (tmp_path / "a.masks").iterdir()} == {
        "0-sky.png", "2-red-car.png", "3-wall-door.png",
    }  # fmt: skip
    with Image.open(tmp_path / "a.masks" / "2-red-car.png") as image:
        assert image.mode == "1"
        np.testing.assert_array_equal(np.array(image), labels == 2)


def test_names_of_masks() -> None:
    assert mask_name(3, "../../etc") == "3-etc.png"
    assert mask_name(0, "ж" * 300) == f"0-{'ж' * 30}.png"


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Segmentation(torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2), tuple(map(str, range(300))))
    image = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match="palette holds 256 classes, got 300"):
        answer.save(tmp_path, formats=["palette"], image=image)
    with pytest.raises(ValueError, match="formats: 'coco' is not one of palette, masks"):
        answer.save(tmp_path, formats=["coco"], image=image)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'catseg-fast\[coco\]'"):
        require_pycocotools()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", sliding_window=False)


def test_mask_shares_and_overlay(model: CATSeg) -> None:
    image = picture(20, 30)
    answer = model.segment(image)
    shares = answer.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    for name, share in shares.items():
        mask = answer.mask(name)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, answer.mask(CLASSES.index(name)))
        assert mask.double().mean().item() == share
    with pytest.raises(ValueError, match="label: 'car' is not one of the 5 classes"):
        answer.mask("car")
    with pytest.raises(TypeError, match="label: expected a class's index or name, got float"):
        answer.mask(1.0)
    assert answer.overlay(legend=False).size == (30, 20)
    assert answer.overlay(legend=False).tobytes() != answer.overlay(legend=False, alpha=0).tobytes()
    with pytest.raises(ValueError, match=r"expected the picture of 30x20 pixels .* got 20x30"):
        answer.overlay(picture(30, 20))
    with pytest.raises(ValueError, match="image: this answer does not know its picture; pass image="):
        Segmentation(answer.labels, answer.scores, answer.classes).overlay()


def test_every_way_to_a_segmentation_knows_its_picture(model: CATSeg, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(picture(20, 30).byte().permute(1, 2, 0).numpy()).save(path)
    expected = model.segment(path).overlay()
    answers = [
        model.segment(io.BytesIO(path.read_bytes())),
        model.segment(path.read_bytes()),
        model.segment(path.as_uri()),
        model.segment(model.encode(path)),
        model.segment(path, keep_logits=True),
        model.segment(path, top_k=2),
        *model.segment([path, str(path)]),
        *model.segment((load_image(path),)),
        *model.segment_batch([path, model.encode(path)]),
    ]
    assert all(answer.overlay().tobytes() == expected.tobytes() for answer in answers)
    assert model.segment([]) == []


def test_save(model: CATSeg, tmp_path: Path) -> None:
    path, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(picture(20, 30).byte().permute(1, 2, 0).numpy()).save(path)
    written = model.segment(path).save(out, formats=list(FORMATS))
    assert [file.name for file in written] == [
        "photo.overlay.png", "photo.labels.png", "photo.palette.png", "photo.masks", "photo.coco-rle.json",
        "photo.coco-polygons.json", "photo.json",
    ]  # fmt: skip
    assert {file.name for file in out.iterdir()} == {file.name for file in written}
    model.segment(path).save(out)  # files that are not written again would belong to an earlier answer
    assert {file.suffix for file in out.iterdir()} == {".png", ".json"}
    assert len(list(out.iterdir())) == 3
    other = tmp_path / "more" / "photo.png"
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    with pytest.raises(FileExistsError, match="results of another picture"):
        model.segment(other).save(out)
    assert model.segment(load_image(path)).save(out)[0].name == "segmentation.overlay.png"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_writes_and_keeps_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(48, 64).byte().permute(1, 2, 0).numpy()).save("photo.png")
    command = ("segment", "photo.png", "--whole", "--classes", "sky; tree", "--device", "cpu")
    formats = ("--format", "masks", "--format", "coco-polygons")
    run(*command)
    assert "up to date" in run(*command)
    assert "up to date" not in run(*command, *formats)
    assert "up to date" in run(*command, *formats)
    folder = Path("segmented")
    with Image.open(folder / "photo.labels.png") as image:
        labels = np.array(image)
    for mask in (folder / "photo.masks").iterdir():
        with Image.open(mask) as image:
            np.testing.assert_array_equal(np.array(image), labels == int(mask.name.partition("-")[0]))
    assert "up to date" in run(*command)  # there are more files than requested
    next((folder / "photo.masks").iterdir()).unlink()
    assert "up to date" not in run(*command, *formats)
    assert [found.path for found in find_pictures([Path()], Path("elsewhere"))] == [Path("photo.png")]


def test_files_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(48, 64).byte().permute(1, 2, 0).numpy()).save("photo.png")
    masks = Path("segmented/photo.masks")
    masks.mkdir(parents=True)
    Image.new("1", (4, 4)).save(masks / "0-mine.png")
    command = ("segment", "photo.png", "--whole", "--classes", "sky; tree", "--device", "cpu")
    run(*command, "--format", "masks")
    assert [file.name for file in masks.iterdir()] == ["0-mine.png"]
    assert read_png_mark(next(Path("segmented/photo-2.masks").iterdir())) is not None


def test_a_format_that_cannot_be_is_said_before_the_model_loads() -> None:
    command = ["segment", "none.png", "--classes-list", "lvis-1203", "--format", "palette"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "--format" in result.output
    assert "256" in result.output
