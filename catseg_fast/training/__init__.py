"""Training: upstream's recipe, on one process or several, that can be killed and continued."""

from catseg_fast.training.recipe import Recipe
from catseg_fast.training.trainer import Trainer

__all__ = ["Recipe", "Trainer"]
