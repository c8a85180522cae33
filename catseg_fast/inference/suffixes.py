"""Suffixes of picture files, without torch."""

from __future__ import annotations

from functools import cache

from PIL import Image

# Pillow only recognises the first five; EPS it hands to Ghostscript.
_NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the formats that Pillow decodes."""
    extensions = Image.registered_extensions()
    return frozenset(
        suffix for suffix, kind in extensions.items() if kind in Image.OPEN and kind not in _NOT_DECODED
    )
