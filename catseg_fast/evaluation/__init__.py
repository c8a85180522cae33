"""Metrics over a data set, resumable and shared between processes.

It may import the model, data and everything that these may import.
"""

from typing import TYPE_CHECKING

from catseg_fast.imports import lazy_attributes

if TYPE_CHECKING:
    from catseg_fast.evaluation.run import Evaluation, evaluate, summarise

__all__ = ["Evaluation", "evaluate", "summarise"]

__getattr__ = lazy_attributes(__name__, dict.fromkeys(__all__, "run"))
