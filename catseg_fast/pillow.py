"""Opening of image files by Pillow without its own limit of pixels: `max_pixels` is the only one."""

from __future__ import annotations

from threading import Lock
from typing import BinaryIO

from PIL import Image

_LOCK = Lock()  # Pillow's limit is the whole process's, and pictures may be opened in threads


def open_image(file: BinaryIO, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open an image as `PIL.Image.open`, which does not decode it; of any size, without a warning."""
    with _LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
