"""catseg-fast: CAT-Seg open-vocabulary semantic segmentation for vocabularies of 1000+ classes."""

from pathlib import Path

from catseg_fast._version import __version__

if not (Path(__file__).parent / "reference").exists():
    # In a source checkout `kernels/` and `reference/` lie beside this folder; installed, inside it.
    __path__.append(str(Path(__file__).parent.parent))

from catseg_fast.accelerate import Acceleration, accelerate
from catseg_fast.aggregator import Aggregator
from catseg_fast.config import VARIANTS, Variant
from catseg_fast.model import CATSeg, Segmentation

__all__ = [
    "VARIANTS",
    "Acceleration",
    "Aggregator",
    "CATSeg",
    "Segmentation",
    "Variant",
    "__version__",
    "accelerate",
]
