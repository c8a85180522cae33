"""`import_dataset`: nested folders, files that are not label maps, and what it keeps, replaces or leaves."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catseg_fast.data.folder import FolderDataset, read_index_map
from catseg_fast.data.pairs import find_pairs
from catseg_fast.data.published import import_dataset
from catseg_fast.data.scenes import write_dataset
from catseg_fast.errors import InputError

CLASSES = ["road", "car", "sky"]
VALUES = np.array([[0, 1, 2, 255], [2, 2, 1, 0]], dtype=np.uint8)


def add(root: Path, image: str, annotation: str, values: np.ndarray = VALUES, shade: int = 0) -> None:
    for path in (root / "im" / image, root / "gt" / annotation):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", values.shape[::-1], (shade,) * 3).save(root / "im" / image)
    Image.fromarray(values).save(root / "gt" / annotation)


def load(root: Path, target: str = "out", **options: object) -> dict[str, list[list[int]]]:
    """Import; return the labels by name."""
    import_dataset(root / "im", root / "gt", CLASSES, root / target, **options)  # type: ignore[arg-type]
    return {entry["name"]: entry["sem_seg"].tolist() for entry in FolderDataset(root / target)}


def test_cityscapes(tmp_path: Path) -> None:
    for city in ("frankfurt", "lindau"):
        frame = f"{city}/{city}_0_1"
        add(tmp_path, f"{frame}_leftImg8bit.png", f"{frame}_gtFine_labelTrainIds.png")
        for kind in ("color", "instanceIds", "labelIds"):
            Image.new("RGB", (3, 3)).save(tmp_path / "gt" / f"{frame}_gtFine_{kind}.png")
        (tmp_path / "gt" / f"{frame}_gtFine_polygons.json").write_text("{}")
    notices: list[str] = []
    found = load(tmp_path, notice=notices.append)
    assert found == {"frankfurt_0_1": VALUES.tolist(), "lindau_0_1": VALUES.tolist()}
    assert notices == [
        f"{tmp_path / 'gt'}: left out 2 files that are not images by their suffixes",
        f"{tmp_path / 'gt'}: took *_labelTrainIds and left out 6 other files of Cityscapes",
    ]


def test_nested_folders_with_equal_names(tmp_path: Path) -> None:
    """Folders as for ADE20K's scenes, or for videos whose frames are numbered in each folder."""
    add(tmp_path, "a/b/1.jpg", "a/b/1.png")
    add(tmp_path, "c/1.jpg", "c/1.png", VALUES[::-1].copy())
    add(tmp_path, "2.jpg", "2.png")
    add(tmp_path, "c/3.jpg", "c/3.png")
    (tmp_path / "gt" / "c" / "3.png").unlink()
    notices: list[str] = []
    found = load(tmp_path, notice=notices.append)
    assert found == {"2": VALUES.tolist(), "a_b_1": VALUES.tolist(), "c_1": VALUES[::-1].tolist()}
    assert notices == [f"{tmp_path / 'im'}: left out 1 images without annotation"]
    add(tmp_path, "a_b/1.jpg", "a_b/1.png")
    with pytest.raises(InputError, match=r"a/b/1\.jpg and .*a_b/1\.jpg: two images .* would be a_b_1"):
        find_pairs(tmp_path / "im", tmp_path / "gt")


def test_an_annotation_in_another_folder_than_its_image(tmp_path: Path) -> None:
    add(tmp_path, "1.jpg", "a/1.png")
    with pytest.raises(InputError, match=r"gt/a/1\.png: annotation without image: no .*im/a/1\.\*"):
        load(tmp_path)


def test_a_data_set_does_not_search_folders_and_says_so(tmp_path: Path) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / folder / "frankfurt").mkdir(parents=True)
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    with pytest.raises(ValueError, match=r"images: no images \(1 folders in it are not searched"):
        FolderDataset(tmp_path)


def test_sizes_are_checked(tmp_path: Path) -> None:
    add(tmp_path, "x.png", "x.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "im" / "x.png")
    with pytest.raises(InputError, match=r"gt/x\.png: the annotation is 4x2, its image .*x\.png is 4x3"):
        load(tmp_path)
    assert not list((tmp_path / "out" / "annotations").iterdir())
    exif = Image.Exif()
    exif[0x0112] = 6  # shown as 4x2
    Image.new("RGB", (2, 4)).save(tmp_path / "im" / "x.png", exif=exif)
    assert load(tmp_path) == {"x": VALUES.tolist()}


def tiff(photometric: int, bits: int = 8, compression: int = 1) -> bytes:
    """Write a TIFF of 4x1 grey or palette pixels 0, 1, 2, 3."""
    pixels = bytes([0, 1, 2, 3]) if bits == 8 else bytes([0b00011011])
    palette = struct.pack(f"<{3 * 2**bits}H", *(range(3 * 2**bits))) if photometric == 3 else b""
    entries = [
        (256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 1, bits), (259, 3, 1, compression),
        (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    start = 8 + len(pixels) + len(palette)
    if palette:
        entries.append((320, 3, 3 * 2**bits, 8 + len(pixels)))
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        b"II*\0"
        + struct.pack("<I", start)
        + pixels
        + palette
        + struct.pack("<H", len(entries))
        + table
        + bytes(4)
    )


def save(format: str, **options: object) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(VALUES).save(path, format=format, **options)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "jpeg": (save("JPEG"), "a JPEG file; label maps are PNG or TIFF"),
    "webp": (save("WEBP", lossless=True), "a WEBP file"),
    "gif": (save("GIF"), "a GIF file"),
    "bmp": (save("BMP"), "a BMP file"),
    "jpeg 2000": (save("JPEG2000"), "a JPEG2000 file"),
    "jpeg in tiff": (save("TIFF", compression="jpeg"), "a TIFF of compression 7"),
    "white is zero": (lambda path: path.write_bytes(tiff(0)), "WhiteIsZero, whose values are inverted"),
    "grey of two bits": (lambda path: path.write_bytes(tiff(1, 2)), "of fewer than 8 bits|of 2 bits"),
    "palette of two bits": (lambda path: path.write_bytes(tiff(3, 2)), "a TIFF of 2 bits per pixel"),
    "pages": (save("TIFF", save_all=True, append_images=[Image.new("L", (4, 2))]), "a file of 2 images"),
    "animation": (save("PNG", save_all=True, append_images=[Image.new("L", (4, 2))]), "a file of 2 images"),
}


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_label_map(tmp_path: Path, kind: str, name: str) -> None:
    """The content counts, not the name."""
    write, reason = REFUSED[kind]
    write(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: expected class indices .*, got .*({reason})"):
        read_index_map(tmp_path / name)


def test_a_lossy_label_map_is_not_imported(tmp_path: Path) -> None:
    add(tmp_path, "x.png", "x.jpg")
    with pytest.raises(InputError, match=r"gt/x\.jpg: .* a JPEG file"):
        load(tmp_path)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_plain_tiffs(tmp_path: Path, compression: str | None, dtype: type) -> None:
    Image.fromarray(VALUES.astype(dtype)).save(tmp_path / "x.tif", compression=compression)
    found = read_index_map(tmp_path / "x.tif")
    assert (found.dtype, found.tolist()) == (dtype, VALUES.tolist())


@pytest.mark.parametrize("photometric", [1, 3])
def test_tiffs_of_grey_and_of_a_palette(tmp_path: Path, photometric: int) -> None:
    (tmp_path / "x.tif").write_bytes(tiff(photometric))
    assert read_index_map(tmp_path / "x.tif").tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("copy", [False, True])
def test_a_second_import_makes_what_is_asked_for(tmp_path: Path, copy: bool) -> None:
    add(tmp_path, "x.png", "x.png", VALUES[:, :3].copy() + 1)
    with pytest.raises(ValueError, match="value 3 in 3 pixels"):
        load(tmp_path, copy=copy)
    assert load(tmp_path, copy=copy, first=1) == {"x": VALUES[:, :3].tolist()}
    add(tmp_path, "x.png", "x.png", VALUES)
    assert load(tmp_path, copy=copy) == {"x": VALUES.tolist()}
    assert load(tmp_path, copy=copy, first=1)["x"][0] == [255, 0, 1, 255]  # the same files, another setting
    other = tmp_path / "other"
    add(other, "x.jpg", "x.png", VALUES.T.copy(), shade=9)
    import_dataset(other / "im", other / "gt", CLASSES, tmp_path / "out", copy=copy)
    (entry,) = FolderDataset(tmp_path / "out")
    assert entry["sem_seg"].tolist() == VALUES.T.tolist()
    assert entry["image"].unique().tolist() == [9]
    assert (tmp_path / "out" / "images" / "x.jpg").is_symlink() != copy


def test_a_repeated_import_writes_nothing(tmp_path: Path) -> None:
    add(tmp_path, "x.png", "x.png")
    load(tmp_path)
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = [path.lstat().st_mtime_ns for path in paths]
    load(tmp_path)
    assert [path.lstat().st_mtime_ns for path in paths] == before
    written = tmp_path / "out" / "annotations" / "x.png"
    content = written.read_bytes()
    written.write_bytes(content[:-30])
    load(tmp_path)
    assert written.read_bytes() == content


@pytest.mark.parametrize("name", ["annotations/x.png", "images/x.png", "images/x.jpg"])
def test_files_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    """For example, a label map that was corrected by hand."""
    add(tmp_path, "x.png", "x.png")
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    Image.new("L", (4, 2), 2).save(foreign)
    before = foreign.read_bytes()
    with pytest.raises(FileExistsError, match=rf"{name} was not made by `catseg-fast dataset`"):
        load(tmp_path)
    assert foreign.read_bytes() == before


def test_images_of_an_earlier_import_are_told(tmp_path: Path) -> None:
    add(tmp_path, "x.png", "x.png")
    load(tmp_path)
    add(tmp_path / "b", "y.png", "y.png")
    notices: list[str] = []
    import_dataset(
        tmp_path / "b" / "im", tmp_path / "b" / "gt", CLASSES, tmp_path / "out", notice=notices.append
    )
    assert notices == [f"{tmp_path / 'out'}: also has 1 images that are not in {tmp_path / 'b' / 'im'}"]


@pytest.mark.parametrize("part", ["images", "annotations"])
def test_the_fingerprint_is_of_the_content(tmp_path: Path, part: str) -> None:
    """Size and time are equal."""
    add(tmp_path, "x.bmp", "x.png")
    load(tmp_path, copy=True)
    first = FolderDataset(tmp_path / "out").fingerprint()
    assert FolderDataset(tmp_path / "out").fingerprint() == first
    (path,) = (tmp_path / "out" / part).iterdir()
    state, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert FolderDataset(tmp_path / "out").fingerprint() != first


def test_scenes_do_not_go_into_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.jpg").write_text("mine")
    with pytest.raises(FileExistsError, match=r"images/000000\.jpg is not of generated scenes"):
        write_dataset(tmp_path, "train", 1)
    assert (tmp_path / "images" / "000000.jpg").read_text() == "mine"
