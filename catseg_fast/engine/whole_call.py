"""The streams of a call; where all launches of a stream can be prepared as one, they are.

A call of one step, and of several steps that write to one tensor, is then one sequence of launches, between
which the host does nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.streaming import Consumer, Stream, may_continue, run_streams
from catseg_fast.engine.terms import ImageTerms, VocabularyTerms

STEPS = 16  # most steps of a call whose launches are prepared as one; their arguments take memory


class Answer:
    """Collects the logits of all classes; stages may write to it directly."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def slot(self, classes: slice) -> Tensor:
        """Return the memory for the logits of some classes."""
        return self.logits[:, classes]

    def __call__(self, classes: slice, part: Tensor) -> None:
        place = self.slot(classes)
        if torch.compiler.is_compiling() or part.data_ptr() != place.data_ptr():
            place[:] = part


def run_call(streams: Sequence[Stream], consume: Consumer) -> None:
    """Run the streams of a call, as `run_streams` does."""
    if len(streams) == 1 and _is_one(streams[0], consume):
        try:
            _run_as_one(streams[0], consume)
            return
        except RuntimeError as error:
            if not may_continue(error, streams[0].image.features):
                raise
    run_streams(streams, consume)


def _is_one(stream: Stream, consume: Consumer) -> bool:
    """Check whether all launches of a stream can be prepared as one."""
    steps = -(-stream.count // stream.chunk)
    return (
        stream.stages.repeats
        and type(stream) is Stream
        and stream.share is stream.selected is stream.spectra is None
        and stream.schedule.policy != "offload"
        and stream.vocabulary.unit is not None
        and all(layer.classes.linear for layer in stream.plan.layers)
        and (steps == 1 or (steps <= STEPS and hasattr(consume, "slot")))
    )


def _run_as_one(stream: Stream, consume: Consumer) -> None:
    image, vocabulary, every = stream.image, stream.vocabulary, slice(0, stream.count)
    blocks = list(itertools.chain(*image.blocks))
    for layer in stream.plan.layers:
        new_memory(layer.classes, stream.length)  # computes its constants, if it is the first one

    def run(
        out: Tensor | None, flag: Tensor | None, features: Tensor, unit: Tensor, *terms: Tensor
    ) -> Tensor:
        given = iter(terms)
        guided = [replace(block, query_key=next(given)) for block in blocks]
        layers = tuple(zip(guided[::2], guided[1::2], strict=True))
        crops = ImageTerms(image.resolution, features, layers, (next(given), next(given)))
        queries, keys = (tuple(next(given) for _ in layers) for _ in range(2))
        classes = VocabularyTerms(vocabulary.features, vocabulary.inverse_norm, unit, queries, keys)
        inner = Stream(stream.stages, stream.plan, crops, classes, None, stream.schedule, flag=flag)
        inner.shrinks = False
        if out is not None:
            run_streams([inner], Answer(out))
            return out
        parts: list[Tensor] = []
        run_streams([inner], lambda _, logits: parts.append(logits))
        return parts[0]

    windows = tuple((block.window, block.shift) for block in blocks)
    key = ("call", stream.schedule.policy, stream.chunk, image.resolution, windows)
    slot = getattr(consume, "slot", None)
    out = None if slot is None else slot(every)
    maps = (*(block.query_key for block in blocks), *image.decoder)
    text = (*vocabulary.queries, *vocabulary.keys)
    inputs = (out, stream.flag, image.features, vocabulary.unit, *maps, *text)
    consume(every, stream.stages.as_one(key, run, *inputs))
