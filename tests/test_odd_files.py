"""Files that decoders read differently: each entry point gives the model the same pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from catseg_fast import CATSeg
from catseg_fast.cli.batch import Batch
from catseg_fast.cli.inputs import Picture
from catseg_fast.data.folder import FolderDataset
from catseg_fast.inference.images import image_size, load_image
from support.tiny import CLASSES, tiny_model

HEIGHT, WIDTH = 40, 56
X, Y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
RGB = np.stack([X * 4, Y * 6, 250 - X * 2 - Y], axis=-1).astype(np.uint8)
GREY = (X * 1100 + Y * 13).astype(np.uint16)  # of 16 bits
Pixels = np.ndarray


def scaled(grey: Pixels) -> Pixels:
    """Return 16-bit grey values in 8 bits, as RGB."""
    return np.repeat(np.floor(grey.astype(float) / 257 + 0.5).astype(np.uint8)[..., None], 3, axis=-1)


def saved(array: Pixels, path: Path, mode: str | None = None, **options: Any) -> None:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)


def grey_png(path: Path) -> Pixels:
    saved(GREY, path)
    return scaled(GREY)


def grey_tiff(path: Path) -> Pixels:
    saved(GREY, path)
    return scaled(GREY)


def big_endian_tiff(path: Path) -> Pixels:
    """Write a file as some microscopes do."""
    image = Image.frombytes("I;16B", (WIDTH, HEIGHT), GREY.astype(">u2").tobytes())
    image.save(path)
    return scaled(GREY)


def one_bit(path: Path) -> Pixels:
    bits = (X + Y) % 3 == 0
    Image.fromarray(bits).save(path)
    return np.repeat((bits * 255).astype(np.uint8)[..., None], 3, axis=-1)


def grey_alpha(path: Path) -> Pixels:
    Image.merge("LA", [Image.fromarray(RGB[..., 0]), Image.fromarray(RGB[..., 1])]).save(path)
    return np.repeat(RGB[..., :1], 3, axis=-1)


def rgba(path: Path) -> Pixels:
    """Return a picture with colours below a transparent alpha, which count."""
    saved(np.dstack([RGB, RGB[..., 0]]), path)
    return RGB


def palette(path: Path) -> Pixels:
    image = Image.fromarray(RGB).quantize(16)
    image.save(path, transparency=3)
    return np.array(image.convert("RGB"))


def cmyk_jpeg(path: Path) -> Pixels:
    """Return a CMYK picture decoded as in Pillow, from ink to light."""
    Image.fromarray(RGB).convert("CMYK").save(path, quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
        ink = np.array(image).astype(int)
    light = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    assert np.abs(light - RGB).mean() < 8
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def turned(orientation: int) -> Callable[[Path], Pixels]:
    def write(path: Path) -> Pixels:
        exif = Image.Exif()
        exif[0x0112] = orientation
        saved(RGB, path, exif=exif)
        upright = {2: np.fliplr(RGB), 3: np.rot90(RGB, 2), 6: np.rot90(RGB, -1), 8: np.rot90(RGB)}
        return np.ascontiguousarray(upright[orientation])

    return write


def float_tiff(path: Path) -> Pixels:
    values = (X * 4).astype(np.float32)
    saved(values, path)
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=-1)


FILES: dict[str, Callable[[Path], Pixels]] = {
    "16-bit.png": grey_png,
    "16-bit.tif": grey_tiff,
    "16-bit-big-endian.tif": big_endian_tiff,
    "1-bit.png": one_bit,
    "1-bit.tif": one_bit,
    "grey-alpha.png": grey_alpha,
    "rgba.png": rgba,
    "palette.png": palette,
    "palette.gif": palette,
    "cmyk.jpg": cmyk_jpeg,
    "turned-2.png": turned(2),
    "turned-3.tif": turned(3),
    "turned-6.png": turned(6),
    "turned-8.webp": turned(8),
    "floats.tif": float_tiff,
}


class Seen(Exception):
    """The model was given a picture."""


class Spy:
    """A model that records its input."""

    def __init__(self) -> None:
        self.model = tiny_model("v2", sliding_window=False)
        self.pixels: list[Tensor] = []
        self.model._encode = self._note  # type: ignore[method-assign]
        self.model._label = lambda pixels, *rest: self._note([pixels])  # type: ignore[method-assign]

    def _note(self, images: Any, readouts: Any = None) -> Any:
        self.pixels += [image.clone() for image in images]
        raise Seen

    def seen(self) -> Tensor:
        (pixels,) = self.pixels
        self.pixels.clear()
        return pixels


@pytest.fixture(scope="module")
def spy() -> Spy:
    return Spy()


def by_path(spy: Spy, path: Path) -> Tensor:
    with pytest.raises(Seen):
        spy.model.segment(path)
    return spy.seen()


def by_content(spy: Spy, path: Path) -> Tensor:
    with pytest.raises(Seen):
        spy.model.segment(path.read_bytes())
    return spy.seen()


def by_pil(spy: Spy, path: Path) -> Tensor:
    with Image.open(path) as image, pytest.raises(Seen):
        spy.model.segment(image)
    return spy.seen()


def by_encode(spy: Spy, path: Path) -> Tensor:
    with pytest.raises(Seen):
        spy.model.encode(path)
    return spy.seen()


def by_command_line(spy: Spy, path: Path) -> Tensor:
    work = Batch(spy.model, {"fingerprint": "x"})
    (outcome,) = work.run([Picture(path, path.parent / "out", path.stem)])
    if not isinstance(outcome.error, Seen):
        assert outcome.error is not None
        raise outcome.error
    return spy.seen()


def by_ray(spy: Spy, path: Path) -> Tensor:
    pytest.importorskip("ray", reason="Ray is not installed: it is in the extra 'ray'")
    from catseg_fast.ray import _Segmenter

    actor = _Segmenter(lambda: spy.model, None, {}, None, "array", "raise", False)
    found = []
    for row in ({"path": str(path)}, {"bytes": path.read_bytes()}):
        with pytest.raises(Seen):
            actor(row)
        found.append(spy.seen())
    assert torch.equal(*found)
    return found[0]


def by_page(spy: Spy, path: Path) -> Tensor:
    pytest.importorskip("gradio", reason="needs gradio: pip install 'catseg-fast[app]'")
    from gradio.components.image import ImageData

    from catseg_fast.app.page import build_page
    from catseg_fast.app.workbench import Workbench

    blocks = build_page(spy.model).blocks.values()
    (component,) = (block for block in blocks if type(block).__name__ == "Image")
    shown = component.preprocess(ImageData(path=str(path), orig_name=path.name))
    with pytest.raises(Seen):
        Workbench(spy.model).segment(shown, CLASSES, sliding_window=False)
    return spy.seen()


def by_data_set(spy: Spy, path: Path) -> Tensor:
    root = path.parent / f"set-{path.name}"
    for folder in ("images", "annotations"):
        (root / folder).mkdir(parents=True)
    (root / "images" / path.name).write_bytes(path.read_bytes())
    try:
        size = image_size(path)
    except ValueError:
        size = (HEIGHT, WIDTH)
    Image.new("L", size[::-1]).save(root / "annotations" / f"{path.stem}.png")
    (root / "classes.json").write_text('["sky"]')
    return FolderDataset(root)[0]["image"]


ENTRIES = {
    "load_image": lambda spy, path: load_image(path),
    "segment, path": by_path,
    "segment, bytes": by_content,
    "segment, PIL": by_pil,
    "encode": by_encode,
    "command line": by_command_line,
    "Ray": by_ray,
    "page": by_page,
    "data set": by_data_set,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", FILES)
def test_every_entry_reads_the_same_pixels(name: str, entry: str, spy: Spy, tmp_path: Path) -> None:
    path = tmp_path / name
    lossless = path.suffix != ".webp"
    expected = torch.from_numpy(FILES[name](path).transpose(2, 0, 1).copy()).float()
    pixels = ENTRIES[entry](spy, path).float()
    if lossless:
        assert torch.equal(pixels, expected)
    else:
        assert (pixels - expected).abs().mean() < 12
        assert torch.equal(pixels, load_image(path))


@pytest.fixture
def nearly_black(tmp_path: Path) -> Path:
    path = tmp_path / "zero-one.tif"
    saved(((X + Y) % 2).astype(np.float32), path)
    return path


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_floats_of_0_and_1(entry: str, spy: Spy, nearly_black: Path) -> None:
    """They could be nearly black or white pictures."""
    with pytest.raises(Exception, match="only the values 0 and 1") as caught:
        ENTRIES[entry](spy, nearly_black)
    assert isinstance(caught.value, ValueError)
    assert "multiply by 255" in str(caught.value)


def test_the_files_are_odd(tmp_path: Path) -> None:
    """A second decoder reads them differently."""
    path = tmp_path / "16-bit.png"
    expected = grey_png(path)
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        careless = np.array(image.convert("RGB"))
    assert np.abs(careless.astype(int) - expected).mean() > 100


def test_the_model_is_a_real_one(spy: Spy, tmp_path: Path) -> None:
    """Without the spy, the entry points label the picture."""
    path = tmp_path / "16-bit.png"
    expected = grey_png(path)
    model: CATSeg = tiny_model("v2", sliding_window=False)
    assert torch.equal(model.segment(path).labels, model.segment(expected).labels)
