"""A model whose classes are split, told by rank 0 what to segment: the other ranks need no picture's file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from catseg_fast.engine.class_parallel import waiting

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

    def encode(self, image: Tensor) -> Tensor:
        """The picture as it is: the ranks encode it together when it is segmented."""
        return image

    def segment(self, image: Tensor) -> Segmentation:
        """On rank 0: `CATSeg.segment` of `[3, H, W]`, uint8, on the CPU, on all ranks."""
        return self.segment_batch([image])[0]

    def segment_batch(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """On rank 0: `CATSeg.segment_batch` of such pictures on all ranks."""
        self._agree([tuple(image.shape) for image in images])
        for image in images:
            self._broadcast(image.contiguous())
        return self.model.segment_batch(images)

    def end(self) -> None:
        """On rank 0: let the others return from `follow`."""
        self._agree([])

    def follow(self) -> None:
        """On the other ranks: do as rank 0 says, to its end.

        Raises:
            RankError: if a rank is gone, or cannot go on.
        """
        while shapes := self._agree([]):
            images = [torch.empty(shape, dtype=torch.uint8) for shape in shapes]
            for image in images:
                self._broadcast(image)
            self.model.segment_batch(images)

    def _agree(self, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes of the next pictures, on every rank, as rank 0 has them; none at the end."""
        count = torch.tensor(len(shapes))
        self._broadcast(count)
        if not count:
            return []
        sizes = torch.tensor(shapes) if shapes else torch.empty(int(count), 3, dtype=torch.long)
        self._broadcast(sizes)
        return [tuple(size) for size in sizes.tolist()]

    def _broadcast(self, tensor: Tensor) -> None:
        with waiting(self._group):
            dist.broadcast(tensor, 0, self._group)
