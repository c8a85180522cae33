"""Labels of encoded pictures: the aggregator runs, and its logits are read out chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from catseg_fast.backend import choose_backend
from catseg_fast.engine.schedule import Schedule
from catseg_fast.errors import RunError
from catseg_fast.inference.encoding import EncodedImage, encode, image_type, join
from catseg_fast.inference.readout import (
    READOUT_BYTES,
    LabelMap,
    LogitStore,
    Readout,
    Target,
    TopClasses,
    read_all,
)
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.numeric import whole
from catseg_fast.reference.model import as_map
from catseg_fast.weights import module_tensors, weights_state

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg


def label(
    model: CATSeg, encoded: Sequence[EncodedImage], top_k: int | None, keep_logits: bool = False
) -> list[Segmentation]:
    """Label encoded pictures together; arguments as in `CATSeg.segment`.

    Raises:
        InputError, InputTypeError: if `top_k` is not a positive number.
        RunError: if logits are requested of classes that are split over processes.
    """
    top_k = None if top_k is None else whole(top_k, "top_k")
    fold = model.fold
    if keep_logits and model.engine.share is not None:
        raise RunError("class parallel: no rank has all logits; segment with keep_logits=False")
    sizes = [image.readout.size for image in encoded]
    targets: list[LabelMap | TopClasses] = [LabelMap(size, model.device) for size in sizes]
    if top_k is not None:
        owners: Sequence[int] | None = None if fold is None else fold.owners
        if model.engine.share is not None:
            owners = (owners or range(len(model.classes)))[model.engine.share.own]
        count = min(top_k, len(model.label_classes))
        targets = [TopClasses(count, size, model.device, owners) for size in sizes]
        top_k = count
    target_bytes = sum(8 * (top_k or 1) * height * width for height, width in sizes)
    share, store = model.engine.share, LogitStore(len(model.classes)) if keep_logits else None
    if share is None:
        read_out(model, encoded, targets, target_bytes, store)
    else:
        dtype, readouts = model.engine.plan().embed.dtype, [image.readout for image in encoded]
        with share.together(model.device, dtype, top_k, model.max_classes, readouts, fold):
            read_out(model, encoded, targets, target_bytes)
            for target in targets:
                if isinstance(target, LabelMap):
                    target.labels = target.labels + share.own.start
                share.merge(target, min(top_k or 1, len(model.label_classes)))
    logits = None if store is None else store.logits
    return [
        Segmentation.of(target, model.classes, image.readout, logits, image.image, fold)
        for image, target in zip(encoded, targets, strict=True)
    ]


@torch.no_grad()
def label_pixels(model: CATSeg, pixels: Tensor, readout: Readout) -> Segmentation:
    """Label one picture `[3, H, W]` on the model's device; equal calls are recorded and replayed."""
    engine, device = model.engine, pixels.device
    if choose_backend(model.backend, device) == "reference" or not engine.recordings.serves(device):
        return label(model, encode(model, [pixels], [readout]), None)[0]
    plan = engine.plan()
    vocabulary = model.vocabulary_terms(plan)
    (H, W), (height, width) = model.variant.feature_resolution, readout.size
    crops = 1 if readout.window is None else readout.window.count
    held = 8 * height * width + max(READOUT_BYTES, readout.class_bytes)
    total, limit = len(model.classes), model.max_classes
    kept = total if limit is None else min(total, limit)
    schedule = engine.schedule(crops, (H, W), kept, held, kept < total)

    def run(pixels: Tensor, checked: bool = False) -> LabelMap:
        target = LabelMap(readout.size, model.device)
        read_out(model, encode(model, [pixels], [readout], checked), [target], schedule=schedule)
        return target

    def finish(target: LabelMap) -> Segmentation:
        return Segmentation.of(target, model.classes, readout, fold=model.fold)

    if not engine.records(device, schedule):
        answer, certain = finish(run(pixels)), image_type(model) == model.dtype
        return answer if certain or not answer.scores.isnan().any() else finish(run(pixels, checked=True))
    weights = engine.recordings.number(weights_state(module_tensors(model, buffers=True)))
    key = ("label", readout, weights, limit, engine.recording_key(plan, vocabulary, schedule))
    answer = engine.recordings(key, [pixels], run, finish)
    # A call that overflows fp16 is computed again, which a recording cannot do.
    return finish(run(pixels, checked=True)) if answer.scores.isnan().any() else answer


@torch.no_grad()
def read_out(
    model: CATSeg,
    encoded: Sequence[EncodedImage],
    targets: Sequence[Target],
    target_bytes: int = 0,
    store: LogitStore | None = None,
    schedule: Schedule | None = None,
) -> None:
    """Run the aggregator on pictures' crops together, and read each one's logits out into its target.

    Args:
        target_bytes: size of the targets.
        store: store to which the logits are added.
        schedule: schedule of the aggregator; by default by the available memory.
    """
    crops = [len(image.features) for image in encoded]
    readouts = [image.readout for image in encoded]
    features = join([image.features for image in encoded])
    guidance = [join(maps) for maps in zip(*(image.guidance for image in encoded), strict=True)]
    backend = choose_backend(model.backend, model.device)
    if backend == "reference":
        if model.engine.share is not None:
            raise RunError("class parallel: the back end 'reference' takes all classes at once")
        text = model.text_features().to(features.dtype).expand(len(features), -1, -1, -1)
        consume = read_all(readouts, targets, crops, backend, store)
        consume(slice(0, len(model.classes)), model.aggregator(as_map(features), text, guidance))
        return
    plan = model.engine.plan()
    vocabulary, img_feats = model.vocabulary_terms(plan), as_map(features)
    if schedule is None:
        held = target_bytes + max(READOUT_BYTES, *(readout.class_bytes for readout in readouts))
        schedule = model.engine.schedule_of(plan, img_feats, vocabulary, model.max_classes, held)
    model.engine.stream(
        img_feats, vocabulary, guidance, model.max_classes,
        lambda: read_all(readouts, targets, crops, backend, store), plan, schedule,
    )  # fmt: skip
