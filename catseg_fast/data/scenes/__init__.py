"""Generated scenes: pictures whose every pixel has a name, to train and to measure on without a download."""

from catseg_fast.data.scenes.dataset import SPLITS, write_dataset
from catseg_fast.data.scenes.scene import Scene, draw_scene

__all__ = ["SPLITS", "Scene", "draw_scene", "write_dataset"]
