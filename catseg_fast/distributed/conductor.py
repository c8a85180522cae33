"""A model whose classes are split, told by rank 0 what to segment: the other ranks need no picture's file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from catseg_fast.engine.class_parallel import waiting
from catseg_fast.inference.images import ImageLike, load_bytes

if TYPE_CHECKING:
    from catseg_fast.inference.segmentation import Segmentation
    from catseg_fast.model import CATSeg

REST = timedelta(days=7)  # rank 0 may read, write and skip pictures for long before the next one comes


class Conductor:
    """Sends each call's pictures from rank 0 to the other ranks, which `follow`.

    Args:
        model: split over all processes of `torch.distributed`; all ranks make a conductor of theirs.
    """

    def __init__(self, model: CATSeg) -> None:
        self.model = model
        self._group: Any = dist.new_group(backend="gloo", timeout=REST)

    def segment(self, image: ImageLike, *, top_k: int | None = None) -> Segmentation:
        """Run `CATSeg.segment` with a picture on the CPU, in 8 bits, on all ranks; called on rank 0."""
        pixels = load_bytes(image, max_pixels=self.model.max_pixels)
        return self.segment_batch([pixels], top_k=top_k)[0]

    def segment_batch(self, images: Sequence[Tensor], *, top_k: int | None = None) -> list[Segmentation]:
        """Run `CATSeg.segment_batch` with such pictures on all ranks; called on rank 0."""
        self._agree([tuple(image.shape) for image in images], top_k)
        for image in images:
            self._broadcast(image.contiguous())
        return self.model.segment_batch(images, top_k=top_k)

    def end(self) -> None:
        """Let the other ranks return from `follow`; called on rank 0."""
        self._agree([])

    def follow(self) -> None:
        """Run the calls of rank 0 until it ends; called on the other ranks.

        Raises:
            RankError: if a rank has ended, or cannot continue.
        """
        while (asked := self._agree([]))[0]:
            shapes, top_k = asked
            images = [torch.empty(shape, dtype=torch.uint8) for shape in shapes]
            for image in images:
                self._broadcast(image)
            self.model.segment_batch(images, top_k=top_k)

    def _agree(
        self, shapes: list[tuple[int, ...]], top_k: int | None = None
    ) -> tuple[list[tuple[int, ...]], int | None]:
        """The shapes of the next pictures, none at the end, and `top_k`, as rank 0 has them."""
        asked = torch.tensor([len(shapes), 0 if top_k is None else top_k])
        self._broadcast(asked)
        count, best = asked.tolist()
        if not count:
            return [], None
        sizes = torch.tensor(shapes) if shapes else torch.empty(count, 3, dtype=torch.long)
        self._broadcast(sizes)
        return [tuple(size) for size in sizes.tolist()], best or None

    def _broadcast(self, tensor: Tensor) -> None:
        with waiting(self._group):
            dist.broadcast(tensor, 0, self._group)
