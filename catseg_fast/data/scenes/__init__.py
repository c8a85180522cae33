"""Generated scenes: fully labelled pictures for training and evaluation without a download."""

from catseg_fast.data.scenes.dataset import SPLITS, write_dataset
from catseg_fast.data.scenes.scene import Scene, draw_scene

__all__ = ["SPLITS", "Scene", "draw_scene", "write_dataset"]
