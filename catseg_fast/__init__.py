"""catseg-fast: CAT-Seg open-vocabulary semantic segmentation for vocabularies of 1000+ classes."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catseg_fast._version import __version__

if TYPE_CHECKING:
    from catseg_fast.acceleration import Acceleration, accelerate
    from catseg_fast.aggregator import Aggregator
    from catseg_fast.config import VARIANTS, Variant
    from catseg_fast.encoding import EncodedImage
    from catseg_fast.model import CATSeg
    from catseg_fast.reference.inference import SlidingWindow
    from catseg_fast.segmentation import Segmentation

if not (Path(__file__).parent / "reference").exists():
    # In a source checkout `kernels/` and `reference/` lie beside this folder; installed, inside it.
    __path__.append(str(Path(__file__).parent.parent))

__all__ = [
    "VARIANTS",
    "Acceleration",
    "Aggregator",
    "CATSeg",
    "EncodedImage",
    "Segmentation",
    "SlidingWindow",
    "Variant",
    "__version__",
    "accelerate",
]

# Imported at first use, so that `catseg-fast --help` need not wait for torch.
_MODULES = {
    "VARIANTS": "config",
    "Acceleration": "acceleration",
    "Aggregator": "aggregator",
    "CATSeg": "model",
    "EncodedImage": "encoding",
    "Segmentation": "segmentation",
    "SlidingWindow": "reference.inference",
    "Variant": "config",
    "accelerate": "acceleration",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
