"""`load_image`: every accepted kind of image gives the same numbers, every bad one a clear error."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from catseg_fast.inference.images import image_size, load_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
RGB[0, 0], RGB[4, 6] = 0, 255
CHW = torch.from_numpy(RGB.transpose(2, 0, 1).astype(np.float32))
RGBA = np.dstack([RGB, np.arange(35, dtype=np.uint8).reshape(5, 7)])

with io.BytesIO() as _file:
    Image.fromarray(RGB).save(_file, "PNG")
    PNG = _file.getvalue()


def save(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGB),
        RGB,
        RGB.astype(np.float16),
        RGB.astype(">f8"),
        np.asfortranarray(RGB),
        RGB[::-1].copy()[::-1],
        CHW,
        CHW.byte(),
        CHW.to(torch.bfloat16),
        torch.from_numpy(RGB).permute(2, 0, 1),
        RGB.transpose(2, 0, 1),
        RGB[None],
        RGBA,
        RGBA.transpose(2, 0, 1).astype(np.float32),
        np.dstack([RGB.astype(np.float32), np.full((5, 7, 1), 300.0, np.float32)]),
        CHW[None],
        torch.cat([CHW, CHW.new_full((1, 5, 7), -1)]),
        PNG,
        bytearray(PNG),
        memoryview(PNG),
    ],
    ids=[
        "pil",
        "uint8",
        "half",
        "big-endian",
        "fortran",
        "flipped",
        "float",
        "byte",
        "bf16",
        "permuted",
        "chw",
        "batch of one",
        "rgba",
        "rgba chw",
        "odd alpha",
        "tensor batch of one",
        "tensor rgba",
        "bytes",
        "bytearray",
        "memoryview",
    ],
)
def test_every_kind_gives_the_same_tensor(image):
    loaded = load_image(image)
    assert loaded.dtype == torch.float32
    assert loaded.is_contiguous()
    torch.testing.assert_close(loaded, CHW, rtol=0, atol=0)


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_a_file_gives_the_same_tensor(tmp_path, as_path):
    path = save(Image.fromarray(RGB), tmp_path / "photo.png")
    assert torch.equal(load_image(as_path(path)), CHW)


def test_read_only_array_is_copied_without_a_warning():
    frozen = RGB.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(frozen).zero_()
    assert frozen.any()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    for name in ("photo.png", "photo.tif"):
        path = save(Image.fromarray(RGB), tmp_path / name, exif=exif)
        assert torch.equal(load_image(path), torch.rot90(CHW, -1, (1, 2)))
        with Image.open(path) as image:
            assert torch.equal(load_image(image), torch.rot90(CHW, -1, (1, 2)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_any_mode_becomes_rgb(mode, tmp_path):
    image = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
    assert torch.equal(load_image(image), torch.full((3, 4, 6), 255.0))


def test_transparent_palette_and_cmyk_files(tmp_path):
    palette = Image.fromarray(RGB).quantize(8)
    path = save(palette, tmp_path / "palette.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_image(path), load_image(palette))
    cmyk = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "red.jpg")
    red, green, blue = load_image(cmyk).mean(dim=(1, 2)).tolist()
    assert red > 200 > 80 > max(green, blue)


def test_sixteen_bit_grey_is_scaled(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("grey.png", "grey.tif"):
        path = save(Image.fromarray(grey), tmp_path / name)
        assert load_image(path)[0].tolist() == [[0, 1, 128, 255]]
    assert load_image(Image.fromarray(grey.astype(np.int32)))[2].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("grey", [RGB[:, :, 0], RGB[:, :, :1], CHW[:1], CHW[:1].byte()])
def test_one_channel_is_repeated(grey):
    loaded = load_image(grey)
    assert torch.equal(loaded, CHW[:1].repeat(3, 1, 1))
    loaded[0].zero_()
    assert loaded[1].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_tiny_images(size, tmp_path):
    path = save(Image.new("RGB", size, (1, 2, 3)), tmp_path / "tiny.png")
    assert load_image(path).shape == (3, size[1], size[0])
    assert load_image(path)[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", [(8000, 6000), (12000, 9000)])
def test_huge_photos_load_without_warnings(size, tmp_path):
    path = save(Image.new("RGB", size, (9, 8, 7)), tmp_path / "huge.png", compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(path)
    assert image.shape == (3, size[1], size[0])
    assert image[:, -1, -1].tolist() == [9, 8, 7]


def test_black_images_are_not_mistaken_for_a_wrong_range(tmp_path):
    assert not load_image(torch.zeros(3, 4, 4)).any()
    mask = save(Image.fromarray(RGB // 255), tmp_path / "mask.png")
    assert load_image(mask).max() == 1


def test_rounding_past_the_range_is_accepted():
    assert load_image(torch.full((3, 2, 2), 255.0001)).max() <= 255.001


def test_a_tensor_keeps_its_gradient():
    image = CHW.clone().requires_grad_()
    load_image(image).sum().backward()
    assert image.grad is not None


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (CHW[0], ValueError, r"photo: expected a tensor \[3, H, W\] .* got shape \[5, 7\]"),
        (CHW[None].repeat(2, 1, 1, 1), ValueError, r"got shape \[2, 3, 5, 7\]"),
        (CHW[:2], ValueError, r"got shape \[2, 5, 7\]"),
        (torch.from_numpy(RGB), ValueError, r"got shape \[5, 7, 3\]; use `permute"),
        (RGB.transpose(1, 0, 2)[:, :2].transpose(0, 2, 1)[:, :2], ValueError, r"got shape \[7, 2, 2\]"),
        (RGB[None].repeat(2, 0), ValueError, r"photo: expected an array \[H, W, 3\], .*\[2, 5, 7, 3\]"),
        (RGB[0, 0], ValueError, r"got shape \[3\]"),
        (np.dstack([RGB, RGB[:, :, :2]]), ValueError, r"got shape \[5, 7, 5\]"),
        (CHW.bool(), TypeError, r"photo: .* got bool"),
        (CHW.long(), TypeError, r"photo: .* got int64"),
        (CHW.to(torch.complex64), TypeError, r"got complex64"),
        (RGB > 3, TypeError, r"photo: .* got bool"),
        (RGB.astype(np.int64), TypeError, r"got int64"),
        (RGB.astype(np.uint16), TypeError, r"got uint16"),
        (RGB.astype(object), TypeError, r"got object"),
        (CHW / 255, ValueError, r"photo: expected values in 0\.\.255, got 0\.\.1 .*\[3, 5, 7\].*by 255"),
        (RGB / 255, ValueError, r"looks like 0\.\.1"),
        (CHW - 128, ValueError, r"got -128\.\.127 in the image of shape \[3, 5, 7\]"),
        (CHW * 2, ValueError, r"got 0\.\.510"),
        (RGB * 1e60, ValueError, r"\d+ of 105 values are NaN or infinite"),
        (CHW.where(CHW > 0, torch.nan), ValueError, r"photo: \d+ of 105 values are NaN"),
        (CHW.where(CHW < 255, -torch.inf), ValueError, r"photo: \d+ of 105 values are NaN or infinite"),
        (torch.zeros(3, 0, 4), ValueError, r"photo: the image is empty, got shape \[3, 0, 4\]"),
        (np.zeros((0, 0), np.uint8), ValueError, r"photo: the image is empty"),
        (Image.new("RGB", (0, 3)), ValueError, r"photo: the image is empty \(0x3\)"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), ValueError, r"photo: .*16-bit.* 70000"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), ValueError, r"photo: 4 of 4 values are NaN"),
        (CHW.to_sparse(), TypeError, r"photo: expected a dense tensor .*, got a torch\.sparse_coo one"),
        (CHW.to("meta"), TypeError, r"photo: expected a dense tensor with values, got a meta one"),
        (torch.nested.nested_tensor([CHW, CHW[:, 1:]]), TypeError, r"got a nested one"),
        ([[1, 2], [3, 4]], TypeError, r"photo: expected a path, .* got list"),
        (None, TypeError, r"got NoneType"),
    ],
)  # fmt: skip
def test_bad_images_say_what_was_seen(image, error, message):
    with pytest.raises(error, match=message):
        load_image(image, "photo")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"photo: no such file: .*none\.jpg"):
        load_image(tmp_path / "none.jpg", "photo")
    with pytest.raises(ValueError, match="is a folder, not an image"):
        load_image(tmp_path)


def encoded(suffix):
    buffer = io.BytesIO()
    Image.fromarray(RGB.repeat(40, 0).repeat(40, 1)).save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "tiff", "gif", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_truncated_files(suffix, share, tmp_path):
    data = encoded(suffix)
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=rf"photo: cannot read .*half\.{suffix}.*: \S"):
        load_image(path, "photo")


def test_files_that_are_no_images(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("not a photo")
    with pytest.raises(ValueError, match=r"cannot read .*notes\.jpg': not a picture in a known format$"):
        load_image(path)


def test_lazily_opened_truncated_pil_image():
    data = encoded("png")
    half = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ValueError, match="photo: cannot decode the image: "):
        load_image(half, "photo")


UNWRITABLE = {
    "rational -1/0": (0x9204, 10, struct.pack("<ii", -1, 0)),
    "negative long": (0x0101, 9, struct.pack("<i", -1)),
    "NaN": (0x0100, 11, struct.pack("<f", float("nan"))),
    "infinity": (0x9204, 12, struct.pack("<d", float("inf"))),
}


def exif_block(tag, kind, value, orientation):
    """EXIF with an orientation and one more tag."""
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)]
    data = value if len(value) > 4 else b""
    inline = struct.pack("<I", 8 + 2 + 24 + 4) if data else value.ljust(4, b"\0")
    entries.append(struct.pack("<HHI", tag, kind, 1) + inline)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(sorted(entries)) + bytes(4) + data


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("what", UNWRITABLE)
def test_exif_that_cannot_be_written_again(tmp_path, what, suffix):
    path = tmp_path / f"x.{suffix}"
    image = Image.fromarray(np.repeat(np.repeat(RGB, 8, 0), 8, 1))
    image.save(path)
    upright = load_image(path)
    image.save(path, exif=exif_block(*UNWRITABLE[what], orientation=6))
    assert torch.equal(load_image(path), torch.rot90(upright, -1, (1, 2)))
    assert image_size(path) == tuple(upright.shape[:0:-1])


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_orientations_are_those_of_pillow(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(RGB), tmp_path / f"x.{suffix}", exif=exif)
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    loaded = load_image(path)
    assert np.array_equal(loaded.permute(1, 2, 0).numpy(), expected)
    assert image_size(path) == expected.shape[:2]


def test_damaged_exif_does_not_stop_reading(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path, exif=b"Exif\0\0no such thing")
    assert torch.equal(load_image(path), CHW)


@pytest.mark.parametrize(
    "image", [(RGB > 99).astype(np.float32), torch.from_numpy((RGB > 99) * 1.0).permute(2, 0, 1)]
)
def test_floats_that_are_only_0_and_1(image):
    with pytest.raises(
        ValueError, match=r"only the values 0 and 1 .*multiply by 255; if it is nearly black, .*uint8"
    ):
        load_image(image)
    with pytest.raises(ValueError, match=r"got 0\.\.0\.5 in .*multiply by 255$"):
        load_image(image / 2)
    assert load_image(image * 255).max() == 255
