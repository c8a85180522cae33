"""Rasters of any size, read in windows and written row by row: GeoTIFF, TIFF, PNG, JPEG, JPEG 2000."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from catseg_fast.errors import InputError
from catseg_fast.files import open_regular
from catseg_fast.identity import file_mark
from catseg_fast.imports import require_rasterio

# GDAL's drivers by how a file starts; it has others that lead to other files, or to a network.
_DRIVERS = {
    b"II*\0": "GTiff", b"MM\0*": "GTiff", b"II+\0": "GTiff", b"MM\0+": "GTiff", b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG", b"\0\0\0\x0cjP  ": "JP2OpenJPEG", b"BM": "BMP",
}  # fmt: skip
_CACHE_MB = 256
_BLOCK = 256  # side of the blocks of a label map


@contextmanager
def open_raster(path: Path) -> Iterator[Raster]:
    """Open a raster for reading.

    Raises:
        FileNotFoundError, InputError: if it cannot be read, or its values are not of 8 or 16 bits.
    """
    require_rasterio()
    import rasterio

    with ExitStack() as stack:
        try:
            driver = _driver(path)
            stack.enter_context(rasterio.Env(GDAL_CACHEMAX=_CACHE_MB))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            dataset = stack.enter_context(rasterio.open(path, driver=driver))
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file: {str(path)!r}") from None
        except (OSError, rasterio.errors.RasterioError) as error:
            raise InputError(f"{path}: cannot read the raster: {error}") from error
        yield Raster(path, dataset)


def _driver(path: Path) -> str:
    with open_regular(path) as file:
        start = file.read(8)
    for magic, driver in _DRIVERS.items():
        if start.startswith(magic):
            return driver
    raise InputError(f"{path}: cannot read the raster: expected TIFF, PNG, JPEG, JPEG 2000 or BMP")


class Raster:
    """An open raster; the first three bands are red, green and blue, a single one is grey.

    Attributes:
        size: (height, width).
    """

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path, self._dataset = path, dataset
        self.size: tuple[int, int] = (dataset.height, dataset.width)
        kinds = set(dataset.dtypes[:3])
        if not kinds <= {"uint8", "uint16"} or len(kinds) > 1:
            raise InputError(
                f"{path}: expected bands of uint8 or uint16 values, got {', '.join(dataset.dtypes)}; "
                "scale it to 0..255 first, with gdal_translate -ot Byte -scale"
            )
        self._bands = [1, 2, 3] if dataset.count >= 3 else [1]
        self._palette = self._colours()

    def _colours(self) -> NDArray[np.uint8] | None:
        """The palette of a raster that has one, uint8 `[256, 3]`."""
        if "palette" not in [kind.name for kind in self._dataset.colorinterp]:
            return None
        entries, table = self._dataset.colormap(1), np.zeros((256, 3), np.uint8)
        for index, colour in entries.items():
            table[index] = colour[:3]
        return table

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """The pixels of a window, uint8 `[3, height, width]`; 16 bits are scaled down, as everywhere.

        Raises:
            InputError: if they cannot be read.
        """
        import rasterio

        window = rasterio.windows.Window(left, top, width, height)
        try:
            values = self._dataset.read(self._bands, window=window)
        except (OSError, rasterio.errors.RasterioError) as error:
            raise InputError(
                f"{self.path}: cannot read rows {top}..{top + height - 1}: {error}; is the file whole?"
            ) from error
        if self._palette is not None:
            values = self._palette[values[0]].transpose(2, 0, 1)
        if values.dtype == np.uint16:
            values = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(values)).expand(3, -1, -1)

    def preview(self, factor: int) -> Tensor:
        """The raster reduced by a whole number: averages, uint8 `[3, H // factor, W // factor]`."""
        height, width = (side // factor for side in self.size)
        rows = max(1, 2**22 // max(1, self.size[1] * factor))
        parts = []
        for start in range(0, height, rows):
            count = min(rows, height - start)
            pixels = self.read(start * factor, 0, count * factor, width * factor)
            blocks = pixels.reshape(3, count, factor, width, factor)
            parts.append(blocks.float().mean(dim=(2, 4)).round().byte())
        return torch.cat(parts, dim=1)

    def write_labels(self, path: Path, labels: NDArray[np.uint16], mark: str) -> None:
        """Write a label map of the raster's size as a TIFF file with the same georeference.

        Args:
            path: where to.
            labels: `[H, W]`; may be mapped from a file, of which a part at a time is read.
            mark: the value of the mark that tells whose result it is.

        Raises:
            OSError: if it cannot be written.
        """
        import rasterio

        try:
            self._write_labels(path, labels, mark)
            with rasterio.open(path) as written:  # GDAL does not tell of all that fails when a file is closed
                for window, part in self._parts(labels):
                    if not np.array_equal(written.read(1, window=window), part):
                        raise OSError("it reads as something else")
        except Exception as error:  # GDAL's are of many types
            reason = error.__cause__ or error
            raise OSError(f"{path.name}: cannot write the label map ({reason}); is the disk full?") from error

    def _parts(self, labels: NDArray[np.uint16]) -> Iterator[tuple[Any, NDArray[np.uint16]]]:
        """Yield some rows at a time of a label map, and their window."""
        import rasterio

        height, width = self.size
        for top in range(0, height, 2 * _BLOCK):
            part = np.array(labels[top : top + 2 * _BLOCK])
            yield rasterio.windows.Window(0, top, width, len(part)), part

    def _write_labels(self, path: Path, labels: NDArray[np.uint16], mark: str) -> None:
        import rasterio

        source, (height, width) = self._dataset, self.size
        place = {"crs": source.crs, "transform": source.transform}
        points, system = source.gcps
        if points:
            place = {"crs": system, "gcps": points}
        with rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=1, dtype="uint16", tiled=True,
            blockxsize=_BLOCK, blockysize=_BLOCK, compress="deflate", BIGTIFF="IF_SAFER", **place,
        ) as target:  # fmt: skip
            target.update_tags(CATSEG_FAST=file_mark(mark))
            for window, part in self._parts(labels):
                target.write(part, 1, window=window)
