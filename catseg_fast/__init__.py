"""catseg-fast: CAT-Seg open-vocabulary semantic segmentation for vocabularies of 1000+ classes.

A file directly in this folder is the model, or something that users import by name; everything else is in a
room whose name says what it is for. Imports run downward only: see `[tool.importlinter]` in pyproject.toml.
"""

from typing import TYPE_CHECKING

from catseg_fast._version import __version__
from catseg_fast.imports import lazy_attributes

if TYPE_CHECKING:
    from catseg_fast.acceleration import Acceleration, accelerate
    from catseg_fast.aggregator import Aggregator
    from catseg_fast.config import VARIANTS, Variant
    from catseg_fast.inference.encoding import EncodedImage
    from catseg_fast.inference.segmentation import Segmentation
    from catseg_fast.model import CATSeg
    from catseg_fast.reference.inference import SlidingWindow
    from catseg_fast.text.class_lists import ready_list

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
    "ready_list",
]

# `catseg-fast --help` need not wait for torch.
__getattr__ = lazy_attributes(
    __name__,
    {
        "VARIANTS": "config",
        "Acceleration": "acceleration",
        "Aggregator": "aggregator",
        "CATSeg": "model",
        "EncodedImage": "inference.encoding",
        "Segmentation": "inference.segmentation",
        "SlidingWindow": "reference.inference",
        "Variant": "config",
        "accelerate": "acceleration",
        "ready_list": "text.class_lists",
    },
)
