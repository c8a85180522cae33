"""From encoded pictures to labels: the aggregator runs, and its logits are read out as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from catseg_fast.backend import choose_backend
from catseg_fast.errors import RunError
from catseg_fast.inference.encoding import EncodedImage
from catseg_fast.inference.readout import READOUT_BYTES, LabelMap, LogitStore, Target, TopClasses, read_all
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.reference.model import as_map

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg


def label(
    model: CATSeg, encoded: Sequence[EncodedImage], top_k: int | None, keep_logits: bool = False
) -> list[Segmentation]:
    """Label encoded pictures together; arguments as of `CATSeg.segment`.

    Raises:
        ValueError: if `top_k` is not positive.
        RuntimeError: if logits are wanted of classes that are shared with other processes.
    """
    if top_k is not None and top_k <= 0:
        raise ValueError(f"top_k: {top_k} is not positive")
    if keep_logits and model.engine.share is not None:
        raise RunError("class parallel: no rank has all logits; segment with keep_logits=False")
    sizes = [image.readout.size for image in encoded]
    targets: list[LabelMap | TopClasses] = [LabelMap(size, model.device) for size in sizes]
    if top_k is not None:
        count = min(top_k, len(model.classes))
        targets = [TopClasses(count, size, model.device) for size in sizes]
    target_bytes = sum(8 * (top_k or 1) * height * width for height, width in sizes)
    share, store = model.engine.share, LogitStore(len(model.classes)) if keep_logits else None
    if share is None:
        read_out(model, encoded, targets, target_bytes, store)
    else:
        dtype, readouts = model.engine.plan().embed.dtype, [image.readout for image in encoded]
        with share.together(model.device, dtype, top_k, model.max_classes, readouts):
            read_out(model, encoded, targets, target_bytes)
            for target in targets:
                share.merge(target, min(top_k or 1, len(model.classes)))
    return [
        Segmentation.of(target, model.classes, image.readout, None if store is None else store.logits)
        for image, target in zip(encoded, targets, strict=True)
    ]


@torch.no_grad()
def read_out(
    model: CATSeg,
    encoded: Sequence[EncodedImage],
    targets: Sequence[Target],
    target_bytes: int,
    store: LogitStore | None = None,
) -> None:
    """Run the aggregator on pictures' crops together, and read each one's logits out into its target."""
    crops = [len(image.features) for image in encoded]
    readouts = [image.readout for image in encoded]
    features = _join([image.features for image in encoded])
    guidance = [_join(maps) for maps in zip(*(image.guidance for image in encoded), strict=True)]
    backend = choose_backend(model.backend, model.device)
    if backend == "reference":
        if model.engine.share is not None:
            raise RunError("class parallel: the back end 'reference' takes all classes at once")
        text = model.text_features().to(features.dtype).expand(len(features), -1, -1, -1)
        consume = read_all(readouts, targets, crops, backend, store)
        consume(slice(0, len(model.classes)), model.aggregator(as_map(features), text, guidance))
        return
    plan = model.engine.plan()
    model.engine.stream(
        as_map(features), model.vocabulary_terms(plan), guidance, model.max_classes,
        lambda: read_all(readouts, targets, crops, backend, store),
        target_bytes + max(READOUT_BYTES, *(readout.class_bytes for readout in readouts)), plan,
    )  # fmt: skip


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
