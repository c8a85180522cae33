"""Training: upstream's recipe, in one process or several; a run that was killed can be continued."""

from catseg_fast.training.recipe import Recipe
from catseg_fast.training.trainer import Trainer

__all__ = ["Recipe", "Trainer"]
