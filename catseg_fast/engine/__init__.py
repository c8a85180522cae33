"""Runs an aggregator, streaming over classes: folded weights, schedules, stages in torch and in Triton.

May import kernels, reference and the ground modules; not the model or anything that reads pictures.
"""

from typing import TYPE_CHECKING

from catseg_fast._lazy import lazy_attributes

if TYPE_CHECKING:
    from catseg_fast.engine.engine import Engine

__all__ = ["Engine"]

__getattr__ = lazy_attributes(__name__, dict.fromkeys(__all__, "engine"))
