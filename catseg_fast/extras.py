"""Packages that only some features need, and the extra of this package that installs each."""

from __future__ import annotations

from importlib import import_module

from catseg_fast.errors import MissingPackageError


def require_pyav() -> None:
    """Check that PyAV, which reads and writes videos, is installed.

    Raises:
        MissingPackageError: if it is not.
    """
    _require("av", "videos need PyAV", "video")


def require_rasterio() -> None:
    """Check that rasterio, which reads and writes rasters in windows, is installed; errors as above."""
    _require("rasterio", "tiles need rasterio", "tiles")


def require_pycocotools() -> None:
    """Check that pycocotools is installed; errors as above."""
    _require("pycocotools.mask", "formats: COCO files need pycocotools", "coco")


def require_outlines() -> None:
    """Check that what COCO polygons need is installed; errors as above."""
    require_pycocotools()
    _require("rasterio.features", "formats: coco-polygons needs rasterio", "coco")


def _require(module: str, need: str, extra: str) -> None:
    try:
        import_module(module)
    except ImportError:
        raise MissingPackageError(f"{need}: pip install 'catseg-fast[{extra}]'") from None
