"""Labels of encoded pictures: the aggregator runs, and its logits are read out chunk by chunk."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from catseg_fast.backend import choose_backend
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.schedule import Schedule
from catseg_fast.engine.terms import VocabularyTerms
from catseg_fast.errors import RunError
from catseg_fast.inference.encoding import EncodedImage, encode, image_tower, join
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
from catseg_fast.weights import WeightsState, module_tensors

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg
    from catseg_fast.reference.clip import DenseCLIP


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
    vocabulary, tower = model.vocabulary_terms(plan), image_tower(model)
    schedule: Schedule | None = None

    def run(pixels: Tensor, checked: bool = False) -> LabelMap:
        target = LabelMap(readout.size, model.device)
        encoded = encode(model, [pixels], [readout], checked)
        read_out(model, encoded, [target], plan=plan, vocabulary=vocabulary, schedule=schedule)
        return target

    def finish(target: LabelMap) -> Segmentation:
        return Segmentation.of(target, model.classes, readout, fold=model.fold)

    answer, key = None, None
    if engine.may_record(device):
        weights = engine.recordings.number(_other_weights(model, tower))
        settings = (readout, weights, weakref.ref(tower), model.max_classes, model.size_divisibility)
        key = ("label", settings, model.training, engine.recording_key(plan, vocabulary))
        answer = engine.recordings.replay(key, [pixels], finish)
    if answer is None:
        schedule = _schedule(model, readout, plan)
        if key is None or schedule.policy == "offload":
            answer, certain = finish(run(pixels)), tower is model.clip_model
            return answer if certain or not answer.scores.isnan().any() else finish(run(pixels, checked=True))
        answer = engine.recordings(key, [pixels], run, finish)
    if not answer.scores.isnan().any():
        return answer
    # A call that overflows fp16 is computed again, which a recording cannot do.
    schedule = _schedule(model, readout, plan)
    return finish(run(pixels, checked=True))


def _other_weights(model: CATSeg, tower: DenseCLIP) -> WeightsState:
    """Return the state of the weights that no other part of a recording's key covers.

    The plan covers the aggregator, the vocabulary covers the text tower, and an image tower in another type
    covers the model's own: each is a new object after a change. Looking weights up twice would take longer
    than everything else before a replay.
    """
    clip = model.clip_model
    covered = {model.aggregator, *clip.text_modules}
    if tower is not clip:
        covered.add(clip.visual)
    return WeightsState(module_tensors(model, buffers=True, without=covered))


def _schedule(model: CATSeg, readout: Readout, plan: Plan) -> Schedule:
    """Return the schedule of a call that labels one picture."""
    (height, width), total, limit = readout.size, len(model.classes), model.max_classes
    crops = 1 if readout.window is None else readout.window.count
    held = 8 * height * width + max(READOUT_BYTES, readout.class_bytes)
    kept = total if limit is None else min(total, limit)
    resolution = model.variant.feature_resolution
    return model.engine.schedule(crops, resolution, kept, held, kept < total, plan)


@torch.no_grad()
def read_out(
    model: CATSeg,
    encoded: Sequence[EncodedImage],
    targets: Sequence[Target],
    target_bytes: int = 0,
    store: LogitStore | None = None,
    plan: Plan | None = None,
    vocabulary: VocabularyTerms | None = None,
    schedule: Schedule | None = None,
) -> None:
    """Run the aggregator on pictures' crops together, and read each one's logits out into its target.

    Args:
        target_bytes: size of the targets.
        store: store to which the logits are added.
        plan: the folded weights, if the caller has them.
        vocabulary: the terms of the classes, if the caller has them.
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
    plan = plan or model.engine.plan()
    vocabulary, img_feats = vocabulary or model.vocabulary_terms(plan), as_map(features)
    if schedule is None:
        held = target_bytes + max(READOUT_BYTES, *(readout.class_bytes for readout in readouts))
        schedule = model.engine.schedule_of(plan, img_feats, vocabulary, model.max_classes, held)
    model.engine.stream(
        img_feats, vocabulary, guidance, model.max_classes,
        lambda: read_all(readouts, targets, crops, backend, store), plan, schedule,
    )  # fmt: skip
