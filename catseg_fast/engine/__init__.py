"""The engine that runs an aggregator, streaming over classes: folded weights, schedules, stages.

It may import kernels, reference and the ground modules, but not the model or anything that reads pictures.
"""

from typing import TYPE_CHECKING

from catseg_fast.imports import lazy_attributes

if TYPE_CHECKING:
    from catseg_fast.engine.engine import Engine

__all__ = ["Engine"]

__getattr__ = lazy_attributes(__name__, dict.fromkeys(__all__, "engine"))
