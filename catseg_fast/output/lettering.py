"""Names in any script, drawn with fonts that have their characters.

A name is drawn in one font if possible, otherwise in several. Fonts are tried in this order: Pillow's own for
ASCII, matplotlib's DejaVu Sans (Latin, Greek, Cyrillic and more), those of the system. Characters that no
font has are written as escapes, never as boxes.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageDraw, ImageFont

from catseg_fast.console import printable

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Piece = tuple[str, str | None]  # text, and the file of its font; None for Pillow's own

PREFIX = 400  # characters of a name that are used: far more than the widest legend shows
MARKS = 8  # combining characters that are kept on one letter
_SUFFIXES = (".ttf", ".otf", ".ttc")
_SYSTEM_FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"),
}
_UNIX_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
# Styles that are less like a legend's letters, and fonts that have a glyph for every character: boxes.
_LATER = ("mono", "serif", "bold", "italic", "oblique", "light", "thin", "black", "condensed")
_NEVER = ("lastresort", "last-resort", "emoji", "adobeblank", "notdef")


def text_width(text: str, size: int) -> float:
    """Return the width of a text in pixels."""
    return sum(_font(path, size).getlength(piece) for piece, path in _pieces(text))


def draw_text(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: tuple[int, int, int]
) -> None:
    """Draw a text whose left end and middle height are `at`."""
    left, middle = at
    for piece, path in _pieces(text):
        font = _font(path, size)
        draw.text((left, middle), piece, ink, font, anchor="lm")
        left += font.getlength(piece)


def shorten(name: str, size: int, width: float) -> str:
    """Return a name as it can be drawn, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(unicodedata.normalize("NFC", printable(name[: PREFIX + 1])).split())
    if len(name) <= PREFIX and text_width(text, size) <= width:
        return text
    low, high = 0, min(len(text), PREFIX)  # characters that fit, and that do not
    while high - low > 1:
        middle = (low + high) // 2
        if text_width(text[:middle] + "…", size) <= width:
            low = middle
        else:
            high = middle
    return text[:low].rstrip(" ,") + "…"


@lru_cache(4096)
def _pieces(text: str) -> tuple[Piece, ...]:
    """Cut a text where its font changes."""
    letters = list(_letters(text))
    shared = next((path for path in _first_fonts() if all(_has(path, letter) for letter in letters)), "")
    if shared != "":
        return (("".join(letters), shared),) if letters else ()
    pieces: list[Piece] = []
    for letter in letters:
        path = _font_of(letter)
        if path == "":
            letter, path = "".join(map(_escape, letter)), None
        if pieces and pieces[-1][1] == path:
            pieces[-1] = (pieces[-1][0] + letter, path)
        else:
            pieces.append((letter, path))
    return tuple(pieces)


def _letters(text: str) -> Iterator[str]:
    """Yield characters with their marks; those that are invisible are skipped."""
    letter = ""
    for character in text:
        category = unicodedata.category(character)
        if category[0] == "M" and letter:
            if "\ufe00" <= character <= "\ufe0f" or len(letter) > MARKS:
                continue
            letter += character
        elif category != "Cf":
            if letter:
                yield letter
            letter = character
    if letter:
        yield letter


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


@cache
def _font(path: str | None, size: int) -> Font:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@lru_cache(2**16)
def _font_of(letter: str) -> str | None:
    """The file of the first font that has a letter; None for Pillow's own, empty if there is none."""
    return next((path for path in (*_first_fonts(), *_system_fonts()) if _has(path, letter)), "")


def _has(path: str | None, letter: str) -> bool:
    """Check whether a font has a letter, and draws something for it."""
    if path is None:
        return letter.isascii()
    if not all(_face(path).get_char_index(ord(character)) for character in letter):
        return False
    try:
        return letter.isspace() or _font(path, 20).getmask(letter).getbbox() is not None
    except OSError:  # a bitmap font that has no letters of this size
        return False


@lru_cache(64)
def _face(path: str) -> FT2Font:
    from matplotlib.ft2font import FT2Font

    return FT2Font(path)


@cache
def _first_fonts() -> tuple[str | None, ...]:
    """Pillow's own font, and that of matplotlib, which need not be imported for this."""
    spec = find_spec("matplotlib")
    folders = [] if spec is None else spec.submodule_search_locations or []
    bundled = (Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf") for folder in folders)
    return None, *(str(path) for path in bundled if path.exists())


@cache
def _system_fonts() -> tuple[str, ...]:
    """The files of the system's fonts that can be read, plain ones first."""
    found = set()
    for folder in _SYSTEM_FOLDERS.get(sys.platform, _UNIX_FOLDERS):
        for parent, _, names in os.walk(os.path.expanduser(folder)):
            found |= {os.path.join(parent, name) for name in names if name.lower().endswith(_SUFFIXES)}
    return tuple(sorted(filter(_is_usable, found), key=_order))


def _is_usable(path: str) -> bool:
    if any(word in os.path.basename(path).lower() for word in _NEVER):
        return False
    try:
        _face(path)
    except Exception:  # damaged files raise errors of many types
        return False
    return True


def _order(path: str) -> tuple[int, str]:
    name = os.path.basename(path).lower().replace("sansserif", "sans")
    return sum(word in name for word in _LATER), name
