"""Imports at first use, and packages that only some features need, with the extra that installs each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from catseg_fast.errors import MissingPackageError


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__` (PEP 562).

    Args:
        package: the package's `__name__`.
        modules: by public name, the module below the package that defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get


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
