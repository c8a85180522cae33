"""Data sets: folders of pictures and label maps, published sets, generated scenes.

It may import text, inference.images and the ground modules.
"""

from typing import TYPE_CHECKING

from catseg_fast.imports import lazy_attributes

if TYPE_CHECKING:
    from catseg_fast.data.folder import FolderDataset

__all__ = ["FolderDataset"]

__getattr__ = lazy_attributes(__name__, dict.fromkeys(__all__, "folder"))
