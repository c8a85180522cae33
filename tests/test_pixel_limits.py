"""The limit of pixels, which every reader looks up before it decodes."""

from __future__ import annotations

import zlib
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from PIL import Image, ImageFile
from typer.testing import CliRunner

from catseg_fast import CATSeg
from catseg_fast.cli import main as cli
from catseg_fast.config import MAX_PIXELS
from catseg_fast.data.folder import FolderDataset, read_index_map
from catseg_fast.errors import InputError
from catseg_fast.identity import SCENE_COMMENT, is_scene, png_mark, read_png_mark
from catseg_fast.inference import decoding
from catseg_fast.inference.images import image_size, load_bytes, load_image, load_pixels
from catseg_fast.output.ownership import is_result
from support.tiny import CLASSES, tiny_model

LIMIT = r"has 30x20 = 600 pixels; the limit is 599 \(max_pixels\)"


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", sliding_window=False)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.mark.usefixtures("no_decoding")
def test_every_reader_looks_at_the_header_first(photo: Path, model: CATSeg) -> None:
    for read in (load_image, load_pixels, load_bytes, image_size):
        with pytest.raises(InputError, match=rf"^image: '.*photo\.png' {LIMIT}"):
            read(photo, max_pixels=599)
    with pytest.raises(InputError, match=rf"^picture: the \d+ bytes {LIMIT}"):
        load_image(photo.read_bytes(), "picture", max_pixels=599)
    with Image.open(photo) as opened, pytest.raises(InputError, match=rf"^image: the image {LIMIT}"):
        load_image(opened, max_pixels=599)
    model.max_pixels = 599
    try:
        for call in (model.segment, model.encode, lambda path: model.segment_batch([path])):
            with pytest.raises(InputError, match=LIMIT):
                call(photo)
    finally:
        model.max_pixels = MAX_PIXELS


def late(path: Path) -> None:
    """Move the EXIF chunk of a PNG behind its pixels, where some tools write it."""
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    length = int.from_bytes(content[start : start + 4], "big") + 12
    end = content.index(b"IEND") - 4
    chunk = content[start : start + length]
    path.write_bytes(content[:start] + content[start + length : end] + chunk + content[end:])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_the_size_needs_no_decoding(
    suffix: str, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    if turned:
        if suffix in ("gif", "bmp"):
            pytest.skip("has no EXIF")
        exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(path, **({"exif": exif} if turned else {}))

    def load(self: Any) -> None:
        pytest.fail("decoded")

    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", load)
        assert image_size(path) == ((30, 20) if turned else (20, 30))
    assert load_image(path).shape == ((3, 30, 20) if turned else (3, 20, 30))


def test_exif_behind_the_pixels_counts(tmp_path: Path) -> None:
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    late(path)
    with Image.open(path) as opened:
        assert "exif" not in opened.info
    assert image_size(path) == (30, 20)
    assert load_image(path).shape == (3, 30, 20)


@pytest.mark.usefixtures("no_decoding")
def test_a_small_file_of_many_pixels_is_refused(tmp_path: Path) -> None:
    """A PNG of 20000 x 20000 pixels in 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "huge.png"
    header = chunk(b"IHDR", pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(InputError, match=r"huge\.png' has 20000x20000 = 400,000,000 pixels; .*200,000,000"):
        load_image(path)


def test_the_limit_can_be_raised_beyond_that_of_pillow(
    photo: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 60)  # Pillow checks parts, too
    for limit in (600, None):
        assert load_image(photo, max_pixels=limit).shape == (3, 20, 30)
        assert load_image(photo.read_bytes(), max_pixels=limit).shape == (3, 20, 30)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert not recwarn.list
    with pytest.raises(InputError, match="max_pixels: 0 is not positive"):
        load_image(photo, max_pixels=0)
    with pytest.raises(InputError, match="max_pixels: -1 is not positive"):
        tiny_model("v2", max_pixels=-1)


@pytest.mark.parametrize(
    ("name", "mode", "options", "kind", "count"),
    [
        ("a.jpg", "RGB", {"progressive": True, "subsampling": 0}, "progressive JPEG", 858),
        ("a.jpg", "CMYK", {"progressive": True}, "progressive JPEG", 1029),
        ("a.jp2", "RGB", {}, "JPEG2000", 1286),
        ("a.webp", "RGB", {}, "WEBP", 1286),
        ("a.tif", "F", {}, "floats", 1715),
        ("a.jpg", "RGB", {}, None, 600),
        ("a.jpg", "RGB", {"progressive": True, "subsampling": 2}, None, 600),
        ("a.jpg", "L", {"progressive": True}, None, 600),
        ("a.png", "RGBA", {}, None, 600),
    ],
)
def test_a_pixel_counts_by_the_memory_that_decoding_it_takes(
    name: str, mode: str, options: dict[str, Any], kind: str | None, count: int, tmp_path: Path
) -> None:
    path, colour = tmp_path / name, 200 if mode in "FL" else (200, 9, 9, 0)[: len(mode)]
    Image.new(mode, (30, 20), colour).save(path, **options)
    assert load_image(path, max_pixels=count).shape == (3, 20, 30)
    expected = "= 600 pixels;"
    if kind is not None:
        expected = f"= 600 pixels in {kind}, which takes the memory of {count:,} to decode;"
    for image in (path, path.read_bytes()):
        with pytest.raises(InputError, match=f"{expected} the limit is {count - 1:,} "):
            load_image(image, max_pixels=count - 1)
    with Image.open(path) as opened:
        opened.load()  # it has taken the memory
        assert load_image(opened, max_pixels=600).shape == (3, 20, 30)


def test_no_reader_has_pillows_limit(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Label maps have ours, and the marks of results are found in pictures of any size."""
    path, scene = tmp_path / "a.labels.png", tmp_path / "scene.jpg"
    Image.new("L", (30, 20)).save(path, pnginfo=png_mark("x"))
    Image.open(photo).save(scene, comment=SCENE_COMMENT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_index_map(path, 600).shape == (20, 30)
    with pytest.raises(InputError, match=rf"a\.labels\.png: the annotation {LIMIT}"):
        read_index_map(path, 599)
    assert read_png_mark(path) == "x"
    assert is_result(path)
    assert is_scene(scene)
    assert not recwarn.list


def test_a_data_set_has_a_limit(photo: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    for folder in ("images", "annotations"):
        (root / folder).mkdir(parents=True)
    photo.rename(root / "images" / "a.png")
    Image.new("L", (30, 20)).save(root / "annotations" / "a.png")
    (root / "classes.json").write_text('["sky"]')
    assert FolderDataset(root, 600)[0]["image"].shape == (3, 20, 30)
    assert FolderDataset(root).pixels(0) == 600
    with pytest.raises(InputError, match=LIMIT):
        FolderDataset(root, 599)[0]
    Image.new("L", (30, 21)).save(root / "annotations" / "a.png")
    with pytest.raises(InputError, match=r"a\.png: the annotation has 30x21 = 630 pixels; the limit is 600"):
        FolderDataset(root, 600)[0]


def test_the_command_has_a_limit(
    photo: Path, model: CATSeg, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = []
    monkeypatch.setattr(
        "catseg_fast.cli.segment.build_model",
        lambda *args, **options: limits.append(options["max_pixels"]) or model,
    )
    command = ["segment", str(photo), "--classes", "; ".join(CLASSES), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, [*command, "--max-pixels", "599"])
    assert result.exit_code == 1
    assert "30x20 = 600 pixels; the limit is 599" in " ".join(result.stderr.split())
    result = CliRunner().invoke(cli.app, [*command, "--max-pixels", "600"])
    assert result.exit_code == 0, result.output
    assert limits == [599, 600]
