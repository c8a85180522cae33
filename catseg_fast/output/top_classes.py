"""Each pixel's best classes in a file: NAME.top.npz."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catseg_fast.errors import InputError
from catseg_fast.output.overlay import UNLABELLED_VALUE

if TYPE_CHECKING:
    from catseg_fast.inference.segmentation import Segmentation

TOP_SUFFIX = ".top.npz"


def write_top_classes(path: Path, segmentation: Segmentation, mark: str) -> None:
    """Write the classes of `top_labels` as an .npz file of numpy.

    It holds "labels", uint16 `[K, H, W]`, indices into "classes", best first, 65535 where the probability is
    below `min_score`; "scores", float32 `[K, H, W]`; and "classes", the names.

    Raises:
        InputError: if there are no `top_labels`, or an index exceeds 16 bits.
    """
    labels, scores = segmentation.top_labels, segmentation.top_scores
    if labels is None or scores is None:
        raise InputError("top_labels: there are none; segment with top_k")
    if len(segmentation.classes) > UNLABELLED_VALUE:
        raise InputError(f"classes: 16 bits hold {UNLABELLED_VALUE}, got {len(segmentation.classes)}")
    np.savez_compressed(
        path,
        labels=labels.numpy().astype(np.uint16),  # -1 becomes 65535
        scores=scores.numpy(),
        classes=np.array(segmentation.classes),
        catseg_fast_mark=np.array(mark),  # `NPZ_MARK`
    )
