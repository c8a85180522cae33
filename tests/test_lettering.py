"""Names in a legend: in any script, of any length."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from catseg_fast.output import lettering
from catseg_fast.output.lettering import draw_text, shorten, text_width
from catseg_fast.output.overlay import overlay

SIZE = 20
SCRIPTS = (
    "Straße Bäume", "gökyüzü ağaç", "źródło", "cây cối", "crème brûlée", "небо", "ουρανός", "ծառ", "ხე",
)  # fmt: skip
MISSING = "\uffff"


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take away the system's fonts, as in a container: those of the package's dependencies must suffice."""
    caches = (lettering._pieces, lettering._font_of, lettering._system_fonts)
    for kept in caches:
        kept.cache_clear()
    monkeypatch.setattr(lettering, "_UNIX_FOLDERS", ())
    yield
    for kept in caches:
        kept.cache_clear()


def drawn(text: str) -> np.ndarray:
    image = Image.new("L", (400, 40))
    draw_text(ImageDraw.Draw(image), (5, 20), text, SIZE, 255)  # type: ignore[arg-type]
    return np.asarray(image)


def boxes(font: str | None) -> np.ndarray:
    """Return the drawing of a font for a character that it does not have."""
    return np.asarray(lettering._font(font, SIZE).getmask(MISSING))


@pytest.mark.usefixtures("no_system_fonts")
@pytest.mark.parametrize("name", SCRIPTS)
def test_letters_beyond_ascii_are_drawn(name: str) -> None:
    for piece, font in lettering._pieces(name):
        assert "\\" not in piece
        mask = lettering._font(font, SIZE)
        for letter in piece.replace(" ", ""):
            glyph = np.asarray(mask.getmask(letter))
            assert glyph.any()
            assert glyph.shape != boxes(font).shape or (glyph != boxes(font)).any()
    assert drawn(name).any()


@pytest.mark.usefixtures("no_system_fonts")
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("天空", r"\u5929\u7a7a"),
        ("하늘 sky", r"\ud558\ub298 sky"),
        ("cat 🐈\ufe0f", r"cat \U0001f408"),
        ("a\uffffb", r"a\uffffb"),
        ("tab\there\nand\x1b[31m \udcff", r"tab here and\x1b[31m \xff"),
        ("zero\u200bwidth", "zerowidth"),
    ],
)
def test_what_no_font_has_is_an_escape(name: str, written: str) -> None:
    assert (drawn(shorten(name, SIZE, 1000)) == drawn(written)).all()


def test_marks_join_their_letter() -> None:
    assert shorten("cafe\u0301", SIZE, 1000) == "café"
    assert (drawn("x\u0302 y") != drawn("x y")).any()
    letters = list(lettering._letters("x" + "\u0302" * 1000 + "y"))
    assert [len(letter) for letter in letters] == [1 + lettering.MARKS, 1]


def test_fonts_of_the_system_are_asked(
    tmp_path, monkeypatch: pytest.MonkeyPatch, no_system_fonts: None
) -> None:  # type: ignore[no-untyped-def]
    """A font in a system folder provides what the others lack; damaged ones are skipped."""
    (tmp_path / "A.ttf").write_bytes(b"no font")
    (tmp_path / "Emoji.ttf").write_bytes(b"never opened")
    monkeypatch.setattr(lettering, "_UNIX_FOLDERS", (str(tmp_path),))
    dejavu = lettering._first_fonts()[1]
    assert dejavu is not None
    shutil.copy(dejavu, tmp_path / "B.ttf")
    monkeypatch.setattr(lettering, "_first_fonts", lambda: (None,))
    lettering._system_fonts.cache_clear()
    assert lettering._system_fonts() == (str(tmp_path / "B.ttf"),)
    assert lettering._pieces("небо") == (("небо", str(tmp_path / "B.ttf")),)


def test_ascii_has_pillows_font() -> None:
    font = ImageFont.load_default(SIZE)
    assert text_width("striped moon", SIZE) == font.getlength("striped moon")
    assert lettering._pieces("striped moon") == (("striped moon", None),)


@pytest.mark.parametrize("name", ["striped pink moon", "i" * 300, "W" * 300, "天" * 50, "x, y" * 20])
@pytest.mark.parametrize("width", [0, 5, 60, 240])
def test_a_cut_name_is_as_long_as_fits(name: str, width: float) -> None:
    cut = shorten(name, SIZE, width)
    if cut == name:
        assert text_width(name, SIZE) <= width
        return
    assert cut.endswith("…")
    kept = len(cut) - 1
    assert kept == 0 or text_width(cut, SIZE) <= width
    assert text_width(name[: kept + 3].rstrip(" ,") + "x…", SIZE) > width


@pytest.mark.parametrize("unit", ["x, y", "天空", "e\u0301\u0302", "i", "سماء", "\u200b", " "])
def test_time_does_not_grow_with_the_name(unit: str) -> None:
    image, labels = torch.zeros(3, 40, 40), torch.zeros(40, 40, dtype=torch.int32)
    overlay(image, labels, ["a" + unit])  # the fonts are looked for once
    begin = time.process_time()
    overlay(image, labels, ["grass" + unit * 250_000])
    assert time.process_time() - begin < 2
