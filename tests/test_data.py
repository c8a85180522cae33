"""The folder data set: what it reads and refuses, and the files and numbers that its errors name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast.data.folder import FolderDataset, read_annotation, read_index_map
from catseg_fast.data.published import import_dataset
from support.command_line import run
from support.data_sets import CLASSES, LABELS, add, make_dataset


def test_an_entry(tmp_path: Path) -> None:
    dataset = FolderDataset(make_dataset(tmp_path))
    assert dataset.classes == tuple(CLASSES)
    assert dataset.ignore_label == 255
    assert dataset.names == ("a",)
    assert len(dataset) == 1
    entry = dataset[0]
    assert entry["name"] == "a"
    assert entry["image"].dtype == torch.uint8
    pixels = np.array(Image.open(tmp_path / "images" / "a.png"))
    assert np.array_equal(entry["image"].permute(1, 2, 0), pixels)
    assert entry["sem_seg"].dtype == torch.int64
    assert np.array_equal(entry["sem_seg"], LABELS)


def test_names_are_sorted_whatever_the_format(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    for name, suffix in (("c", ".jpg"), ("b", ".webp"), ("d.e", ".bmp")):
        add(root, name, LABELS, suffix)
    (root / "images" / ".DS_Store").write_bytes(b"x")
    dataset = FolderDataset(str(root))
    assert dataset.names == ("a", "b", "c", "d.e")
    assert [entry["name"] for entry in dataset] == list(dataset.names)
    with pytest.raises(IndexError):
        dataset[4]


def test_loader_workers_can_have_it(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    add(root, "b", LABELS)
    dataset = pickle.loads(pickle.dumps(FolderDataset(root)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1)
    assert [entry["name"] for entry in loader] == ["a", "b"]


@pytest.mark.parametrize("classes", [3, 255, 256, 1203, 65535])
def test_sixteen_bits(tmp_path: Path, classes: int) -> None:
    labels = np.array([[0, min(classes, 40000) - 1], [65535, 1]], dtype=np.uint16)
    dataset = FolderDataset(make_dataset(tmp_path, labels, classes))
    assert dataset.ignore_label == (255 if classes <= 255 else 65535)
    expected = [[0, min(classes, 40000) - 1], [dataset.ignore_label, 1]]
    assert dataset[0]["sem_seg"].tolist() == expected


def test_the_last_of_eight_bits_is_a_class_where_there_are_more(tmp_path: Path) -> None:
    labels = np.array([[0, 255]], dtype=np.uint8)
    few, many = make_dataset(tmp_path / "few", labels, 255), make_dataset(tmp_path / "many", labels, 256)
    assert FolderDataset(few)[0]["sem_seg"].tolist() == [[0, FolderDataset(few).ignore_label]]
    assert FolderDataset(many)[0]["sem_seg"].tolist() == [[0, 255]]
    assert FolderDataset(many).ignore_label == 65535


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_s_indices_count_and_not_its_colours(tmp_path: Path, bits: int) -> None:
    indices = np.array([[0, 1], [1, 2**bits - 1]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette([value for index in range(2**bits) for value in (255 - index, 7, index // 2)])
    image.save(tmp_path / "palette.png", bits=bits)
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert read_index_map(tmp_path / "palette.png").tolist() == indices.tolist()


def test_indices_beyond_the_class_list(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[0, 0], labels[1, 1], labels[2, 2] = 3, 7, 3
    dataset = FolderDataset(make_dataset(tmp_path, labels))
    with pytest.raises(ValueError, match=r"annotations/a\.png: .* index 7 in 3 pixels, .* 3 classes, 0\.\.2"):
        dataset[0]


def test_an_index_between_eight_bits_and_the_class_list(tmp_path: Path) -> None:
    Image.fromarray(np.array([[255, 256]], dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .* index 256 in 1 pixels, .* has 10 classes, 0\.\.9"):
        read_annotation(tmp_path / "a.png", 10)


def test_image_without_annotation(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    add(root, "b", LABELS, ".jpg")
    (root / "annotations" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"images/b\.jpg: image without annotation: no .*annotations/b\.png"):
        FolderDataset(root)


def test_annotation_without_image(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    Image.fromarray(LABELS).save(root / "annotations" / "b.png")
    with pytest.raises(ValueError, match=r"annotations/b\.png: annotation without image: no .*images/b\.\*"):
        FolderDataset(root)


def test_size_mismatch(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    Image.fromarray(LABELS[:2]).save(root / "annotations" / "a.png")
    with pytest.raises(
        ValueError, match=r"annotations/a\.png: the annotation is 4x2, its image .*a\.png is 4x3"
    ):
        FolderDataset(root)[0]


def test_two_images_of_one_name(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    add(root, "a", LABELS, ".jpg")
    with pytest.raises(ValueError, match=r"images/a\.jpg and .*images/a\.png: two files of one name"):
        FolderDataset(root)


def test_no_images(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    for folder in ("images", "annotations"):
        (root / folder / "a.png").unlink()
    with pytest.raises(ValueError, match="images: no images"):
        FolderDataset(root)


@pytest.mark.parametrize("missing", ["images", "annotations", "classes.json"])
def test_missing_parts(tmp_path: Path, missing: str) -> None:
    root = make_dataset(tmp_path / "data")
    (root / missing).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=missing):
        FolderDataset(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no class names"),
        ('{"a": 1}', "'a' has 1; expected its name or a list of its names"),
        ('{"a": []}', "'a' has no names"),
        ("[", "not JSON"),
        ("65536", "65536 classes"),
    ],
)
def test_bad_class_lists(tmp_path: Path, content: str, message: str) -> None:
    root = make_dataset(tmp_path)
    text = json.dumps(["x"] * int(content)) if content.isdigit() else content
    (root / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.json.*{message}"):
        FolderDataset(root)


def test_annotations_with_colours(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    for mode in ("RGB", "RGBA", "LA"):
        Image.fromarray(LABELS).convert(mode).save(root / "annotations" / "a.png")
        with pytest.raises(
            ValueError, match=rf"a\.png: expected class indices .*, got an image of mode {mode}$"
        ):
            FolderDataset(root)[0]


@pytest.mark.parametrize("orientation", [2, 3, 6])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_turned_annotations_are_refused(suffix: str, orientation: int, tmp_path: Path) -> None:
    """Their pictures are turned, and half of all tools would not turn a label map."""
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(LABELS).save(path, exif=exif)
    with pytest.raises(ValueError, match=rf"got an image that EXIF orientation {orientation} turns; store"):
        read_index_map(path)
    exif[0x0112] = 1
    Image.fromarray(LABELS).save(path, exif=exif)
    assert np.array_equal(read_index_map(path), LABELS)


def test_grey_of_few_bits_is_refused_as_pillow_stretches_it(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)  # four pixels of 2 bits: 0, 1, 2, 3
    rows = zlib.compress(bytes([0, 0b00011011]))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert np.array(Image.open(tmp_path / "a.png")).tolist() != [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"a\.png: expected .*, got an image grey of fewer than 8 bits"):
        read_index_map(tmp_path / "a.png")
    Image.fromarray(LABELS > 0).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="fewer than 8 bits"):
        read_index_map(tmp_path / "b.png")


def test_damaged_files(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    whole = (root / "annotations" / "a.png").read_bytes()
    (root / "annotations" / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"annotations/a\.png: cannot read the annotation"):
        FolderDataset(root)[0]
    (root / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"images/a\.png"):
        FolderDataset(root)[0]


def test_annotation_of_another_format(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    (root / "annotations" / "a.png").rename(root / "annotations" / "a.tif")
    with pytest.raises(ValueError, match=r"annotations/a\.tif: expected an annotation as PNG"):
        FolderDataset(root)


def published(root: Path, maps: dict[str, np.ndarray], suffix: str = ".png") -> Path:
    """A data set in another layout: `pictures`, `maps` and `names.json` with three classes."""
    (root / "pictures").mkdir(parents=True)
    (root / "maps").mkdir()
    (root / "names.json").write_text(json.dumps(CLASSES))
    for name, values in maps.items():
        pixels = np.full((*values.shape, 3), len(name), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{name}.jpg")
        Image.fromarray(values).save(root / "maps" / f"{name}{suffix}")
    return root


def test_import_of_maps_that_count_from_one(tmp_path: Path) -> None:
    """ADE20K-150 is published like this: 0 means that no class is right."""
    values = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    root = published(tmp_path / "ade", {"a": values, "b": values.T.copy()})
    Image.new("RGB", (2, 2)).save(root / "pictures" / "test.jpg")
    result = run(
        "dataset", root / "pictures", root / "maps", root / "names.json", tmp_path / "out", "--first", 1
    )
    assert result.exit_code == 0, result.output
    assert "2 images, 3 classes" in result.stdout
    data = FolderDataset(tmp_path / "out")
    assert (data.names, data.classes) == (("a", "b"), tuple(CLASSES))
    assert data[0]["sem_seg"].tolist() == [[255, 0], [1, 2]]
    assert (tmp_path / "out" / "images" / "a.jpg").is_symlink()
    assert data[0]["image"].unique().tolist() == [1]


def test_import_of_pascal_voc_with_background(tmp_path: Path) -> None:
    """Upstream's script prepares it like this; the class list comes with the package."""
    root = published(tmp_path / "voc", {"a": np.array([[20, 0], [19, 255]], dtype=np.uint8)})
    result = run("dataset", root / "pictures", root / "maps", "PAS-20b", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "1 images, 21 classes" in result.stdout
    data = FolderDataset(tmp_path / "out")
    assert (data.classes[0], data.classes[20], len(data.classes)) == ("aeroplane", "background", 21)
    assert data.fold is not None
    assert data.fold.owners[-39:] == (20,) * 39
    assert data[0]["sem_seg"].tolist() == [[20, 0], [19, 255]]
    listed = run("dataset", root / "pictures", root / "maps", "pas-20", tmp_path / "other")
    assert "the annotation has value 20 in 1 pixels, but 20 classes are 0..19" in listed.stderr
    train = run("train", "--data", tmp_path / "out", "--variant", "demo", "--output", tmp_path / "run")
    assert train.exit_code == 1
    assert "have several names each, and training takes one" in train.stderr


@pytest.mark.parametrize("classes", [3, 300])
def test_import_of_sixteen_bits(tmp_path: Path, classes: int) -> None:
    """Upstream's script prepares ADE20K-847 like this: TIFF, with 65535 where no class is right."""
    values = np.array([[0, 65535], [classes - 1, 1]], dtype=np.uint16)
    root = published(tmp_path / "full", {"a": values}, ".tif")
    names = [f"class {index}" for index in range(classes)]
    assert import_dataset(root / "pictures", root / "maps", names, tmp_path / "out", copy=True) == 1
    data = FolderDataset(tmp_path / "out")
    assert data[0]["sem_seg"].tolist() == [[0, data.ignore_label], [classes - 1, 1]]
    assert Image.open(tmp_path / "out" / "annotations" / "a.png").mode == ("L" if classes == 3 else "I;16")
    assert not (tmp_path / "out" / "images" / "a.jpg").is_symlink()


def test_import_goes_on(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    root = published(tmp_path / "voc", {"a": values, "b": values, "c": values})
    Image.fromarray(values + 3).save(root / "maps" / "b.png")

    def call(classes: list[str] = CLASSES) -> int:
        return import_dataset(root / "pictures", root / "maps", classes, tmp_path / "out")

    with pytest.raises(ValueError, match=r"maps/b\.png: .* value 5 in 3 pixels, but 3 classes are 0\.\.2"):
        call()
    first = tmp_path / "out" / "annotations" / "a.png"
    written = first.stat().st_mtime_ns
    Image.fromarray(values).save(root / "maps" / "b.png")
    assert call() == 3
    assert first.stat().st_mtime_ns == written
    assert [entry["sem_seg"].tolist() for entry in FolderDataset(tmp_path / "out")] == 3 * [[[0, 1, 2, 255]]]
    with pytest.raises(ValueError, match=r"classes\.json: the folder has other classes"):
        call(["x", "y", "z"])


def test_import_of_what_is_none(tmp_path: Path) -> None:
    values = np.array([[0]], dtype=np.uint8)
    root = published(tmp_path / "data", {"a": values})
    names, out = root / "names.json", tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([root / "none", root / "maps", names, out], "none: no such folder"),
        ([root / "pictures", tmp_path / "empty", names, out], "empty: no annotations"),
        ([tmp_path / "empty", root / "maps", names, out], "a.png: annotation without image"),
        ([root / "pictures", root / "maps", root / "none.json", out], "none.json"),
        ([root / "pictures", root / "maps", names, tmp_path / "file" / "out"], "Not a directory"),
    ):
        result = run("dataset", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.startswith("error:")
