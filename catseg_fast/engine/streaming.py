"""An aggregator's stages over chunks of classes, with memory that need not grow with the number of classes.

Layer by layer, a chunk passes through the window-attention blocks, and its keys and values are added to the
layer's class memory. After all classes, the next pass applies the memory to each chunk. Between two passes, a
chunk's state is either stored, or computed again from the features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from catseg_fast.engine import fourier
from catseg_fast.engine.chunk_store import ResidentState, State, new_state
from catseg_fast.engine.class_memory import ClassMemory, LinearMemory, new_memory
from catseg_fast.engine.class_parallel import ClassShare
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.schedule import Schedule
from catseg_fast.engine.stages import Stages
from catseg_fast.engine.terms import ImageTerms, VocabularyTerms, chunk_text
from catseg_fast.reference.aggregator import DROPPED_LOGIT

Consumer = Callable[[slice, Tensor], None]


@dataclass(frozen=True)
class _Entry:
    """A function of a chunk and its inputs; the key has all that it depends on besides them and the plan."""

    key: object
    run: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]


class Stream:
    """One call: crops and a vocabulary that pass through the stages.

    If the vocabulary is a `share`, each crop aggregates `length` classes on all ranks, else the vocabulary's
    own. The `flag`, `[1]` int32, is set to 1 if a logit is infinite or NaN.

    Attributes:
        shrinks: whether to continue in smaller steps if memory runs out; else that is an error.
    """

    shrinks = True

    def __init__(
        self,
        stages: Stages,
        plan: Plan,
        image: ImageTerms,
        vocabulary: VocabularyTerms,
        selected: Tensor | None,
        schedule: Schedule,
        share: ClassShare | None = None,
        length: int | None = None,
        flag: Tensor | None = None,
    ) -> None:
        self.stages, self.share, self.flag = stages, share, flag
        self.plan, self.image, self.vocabulary, self.selected = plan, image, vocabulary, selected
        self.schedule, self.chunk = schedule, schedule.chunk
        self.count = vocabulary.classes if selected is None else selected.shape[1]
        self.length = self.count if length is None else length
        self.memories: list[ClassMemory] = []
        self._slots: tuple[Tensor, Tensor] | None = None
        self.spectra: fourier.Spectra | None = None
        if fourier.pays_off(plan, image.crops * self.count):
            self.spectra = fourier.make_spectra(plan, image.features, image.resolution)
        self.state = self._new_state()

    def run(self, consume: Consumer) -> None:
        """Fill one class memory per layer, then decode."""
        run_streams([self], consume)

    def aggregate(self) -> None:
        """Fill one class memory per layer; decode the selected classes, if only some are aggregated."""
        share, crops = self.share, slice(0, self.image.crops)
        for index, layer in enumerate(self.plan.layers):
            memory = new_memory(layer.classes, self.length, padded=share is None or share.rank == 0)
            # A kernel collects all chunks at once if they are resident. A chunk's last step is then the one
            # that writes to the state, so that a step that runs out of memory can start again.
            resident = self.state if isinstance(self.state, ResidentState) else None
            if resident is not None and self.stages.collects_at_once:

                def write(classes: slice, index: int = index, resident: ResidentState = resident) -> None:
                    self._spatial(index, crops, classes, resident.slot(classes))

                self.for_each_chunk(self.count, write)
                every = slice(0, self.count)
                self._collect(index, memory, resident.load(crops, every), every, last=share is None)
            else:

                def fill(classes: slice, index: int = index, memory: ClassMemory = memory) -> None:
                    self._fill(index, memory, classes)

                self.for_each_chunk(self.count, fill)
            if share is not None:
                (H, W), (h, w) = self.image.resolution, layer.classes.pooling or (1, 1)
                share.add_up(memory, self.image.crops, (H // h) * (W // w), layer.classes.q)
            memory.close(self.plan.embed.dtype)
            self.memories.append(memory)
        if self.selected is not None:
            self._slots = self._decode_selected(self.selected)

    @property
    def decodes_in_place(self) -> bool:
        """Check whether `decode` can write to a given tensor; otherwise it concatenates parts."""
        return self._slots is None

    def decode(self, classes: slice, out: Tensor | None = None) -> Tensor:
        """Return logits `[B, t, 4H, 4W]` of a chunk of all classes, once they are aggregated.

        They are written to `out` if the stream decodes in place.
        """
        if self._slots is None:
            return self._decode(slice(0, self.image.crops), classes, out)
        logits, slots = self._slots
        crops = torch.arange(self.image.crops, device=slots.device)[:, None]
        return logits[crops, slots[:, classes]]

    def _new_state(self) -> State | None:
        return new_state(self.schedule.policy, self.plan, self.image, self.count, self.chunk)

    def _fill(self, index: int, memory: ClassMemory, classes: slice) -> None:
        """Pass a chunk through the window blocks of a layer, and add its keys and values to `memory`."""
        x = self._spatial(index, slice(0, self.image.crops), classes)
        self._collect(index, memory, x, classes, last=self.share is None and classes.stop == self.count)
        if self.state is not None:
            self.state.save(classes, x)

    def _collect(self, index: int, memory: ClassMemory, x: Tensor, classes: slice, last: bool) -> None:
        text = self._text(self.vocabulary.keys[index], slice(0, self.image.crops), classes)
        resolution = self.image.resolution
        self.stages.class_collect(self.plan.layers[index].classes, memory, x, text, resolution, last)

    def for_each_chunk(self, total: int, step: Callable[[slice], None]) -> None:
        """Call `step` with slices of at most `chunk`; if memory runs out, continue with half of that."""
        start = 0
        while start < total:
            stop = min(start + self.chunk, total)
            try:
                step(slice(start, stop))
            except RuntimeError as error:
                if not self.shrinks or stop - start == 1 or not may_continue(error, self.image.features):
                    raise
                if self.chunk == self.schedule.chunk:
                    warnings.warn(
                        f"out of memory with {stop - start} classes per step: continuing with fewer",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                self.chunk = (stop - start) // 2
                continue
            start = stop

    def _spatial(self, index: int, crops: slice, classes: slice, out: Tensor | None = None) -> Tensor:
        """Return a chunk after the window blocks of layer `index`, `[b, t, HW, C]`, in `out` if given."""
        enter = self._entry(index, crops, classes) if self.stages.repeats else None
        if enter is None:
            x = self._embed(crops, classes) if index == 0 else self._classes(index - 1, crops, classes)
            return self._blocks(index, crops, x, out)
        blocks, guidance = self.plan.layers[index].blocks, self.image.of(crops).blocks[index]

        def run(out: Tensor | None, first: Tensor, second: Tensor, *inputs: Tensor | None) -> Tensor:
            x = enter.run(*inputs)
            x = self.stages.window_block(blocks[0], replace(guidance[0], query_key=first), x, None)
            return self.stages.window_block(blocks[1], replace(guidance[1], query_key=second), x, out)

        windows = tuple((part.window, part.shift) for part in guidance)
        key = ("spatial", index, windows, enter.key)
        maps = (guidance[0].query_key, guidance[1].query_key)
        return self.stages.as_one(key, run, out, *maps, *enter.inputs)

    def _blocks(self, index: int, crops: slice, x: Tensor, out: Tensor | None = None) -> Tensor:
        image = self.image.of(crops)
        first, second = zip(self.plan.layers[index].blocks, image.blocks[index], strict=True)
        x = self.stages.window_block(*first, x, None)
        return self.stages.window_block(*second, x, out)

    def _classes(self, index: int, crops: slice, classes: slice) -> Tensor:
        """Return a chunk after the class attention of layer `index`: `[b, t, HW, C]`."""
        if self.state is not None:
            x = self.state.load(crops, classes)
        else:
            x = self._spatial(index, crops, classes)
        return self._attend(index, crops, classes, x, self.memories[index].of(crops))

    def _attend(self, index: int, crops: slice, classes: slice, x: Tensor, memory: ClassMemory) -> Tensor:
        text = self._text(self.vocabulary.queries[index], crops, classes)
        layer = self.plan.layers[index].classes
        return self.stages.class_apply(layer, x, text, memory, self.image.resolution)

    def _embed(self, crops: slice, classes: slice) -> Tensor:
        vocabulary = self.vocabulary
        text = self._text(vocabulary.unit, crops, classes)
        if text is None:
            features = self._text(vocabulary.features, crops, classes)
            inverse_norm = self._text(vocabulary.inverse_norm, crops, classes)
            text = chunk_text(features, inverse_norm, self.plan.embed.dtype)
        resolution = self.image.resolution
        if self.spectra is not None:
            return fourier.embed_cost_volume(self.plan, self.spectra, crops, text)
        return self.stages.embed_cost_volume(self.plan, self.image.features[crops], text, resolution)

    def _decode(self, crops: slice, classes: slice, out: Tensor | None = None) -> Tensor:
        layers, resolution = len(self.plan.layers), self.image.resolution
        guidance = self.image.of(crops).decoder
        enter = self._entry(layers, crops, classes) if self.stages.repeats else None
        if enter is None:
            x = self._classes(layers - 1, crops, classes) if layers else self._embed(crops, classes)
            return self.stages.decode(self.plan, guidance, x, resolution, out, self.flag)

        def run(
            out: Tensor | None, flag: Tensor | None, first: Tensor, second: Tensor, *inputs: Tensor | None
        ) -> Tensor:
            x = enter.run(*inputs)
            return self.stages.decode(self.plan, (first, second), x, resolution, out, flag)

        return self.stages.as_one(("decode", enter.key), run, out, self.flag, *guidance, *enter.inputs)

    def _entry(self, index: int, crops: slice, classes: slice) -> _Entry | None:
        """Return the way of a chunk to layer `index`'s window blocks, or to the decoder after the last layer.

        None if it is not only by kernels.
        """
        resolution, plan = self.image.resolution, self.plan
        if index == 0:
            text = self._text(self.vocabulary.unit, crops, classes)
            if text is None or self.spectra is not None:
                return None

            def embed(image: Tensor, text: Tensor) -> Tensor:
                return self.stages.embed_cost_volume(plan, image, text, resolution)

            return _Entry(("embed", resolution), embed, (self.image.features[crops], text))
        memory, layer = self.memories[index - 1].of(crops), plan.layers[index - 1].classes
        if not isinstance(memory, LinearMemory):
            return None
        if self.state is not None:
            x = self.state.load(crops, classes)
        else:
            x = self._spatial(index - 1, crops, classes)

        def attend(x: Tensor, text: Tensor | None, means: Tensor, key_sum: Tensor) -> Tensor:
            return self.stages.class_apply(layer, x, text, memory.closed_with(means, key_sum), resolution)

        text = self._text(self.vocabulary.queries[index - 1], crops, classes)
        key = ("apply", index, resolution, memory.heads, memory.length, memory.eps)
        return _Entry(key, attend, (x, text, *memory.closed()))

    def _decode_selected(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Decode each crop's selected classes, in chunks of all crops.

        Shapes do not depend on which classes are selected, so that the call can be recorded in a graph.

        Returns:
            Logits `[B, n + 1, 4H, 4W]` of n selected classes and of the dropped ones (-100), and the index of
            each class among these, `[B, T]`.
        """
        (H, W), (crops, count) = self.image.resolution, selected.shape
        parts: list[Tensor] = []

        def decode(slots: slice) -> None:
            parts.append(self._decode(slice(0, crops), slots))

        self.for_each_chunk(count, decode)
        parts.append(self.image.features.new_full((crops, 1, 4 * H, 4 * W), DROPPED_LOGIT))
        slots = selected.new_full((crops, self.vocabulary.classes), count)
        slots.scatter_(1, selected, torch.arange(count, device=slots.device).expand_as(selected))
        return torch.cat(parts, dim=1), slots

    def _text(self, tensor: Any, crops: slice, classes: slice) -> Any:
        """Return a chunk `[b or 1, t, …]` of a vocabulary term `[B or 1, T, …]`."""
        if tensor is None:
            return None
        if len(tensor) > 1:
            tensor = tensor[crops]
        if self.selected is None:
            return tensor[:, classes]
        kept = self.selected[crops, classes]
        if len(tensor) == 1:
            return tensor[0][kept]
        return tensor.gather(
            1, kept.view(*kept.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
        )


def run_streams(streams: Sequence[Stream], consume: Consumer) -> None:
    """Run the streams of one vocabulary, each with other crops.

    If possible, and if `consume` has this method, logits are written to `consume.slot(classes)`.
    """
    for stream in streams:
        stream.aggregate()
    slot = getattr(consume, "slot", None)

    def decode(classes: slice) -> None:
        if slot is not None and len(streams) == 1 and streams[0].decodes_in_place:
            consume(classes, streams[0].decode(classes, slot(classes)))
            return
        logits = []
        for stream in streams:  # in a comprehension, `torch.compile` would treat `classes` as a constant
            logits.append(stream.decode(classes))
        consume(classes, logits[0] if len(logits) == 1 else torch.cat(logits))

    streams[0].for_each_chunk(streams[0].vocabulary.classes, decode)


def may_continue(error: RuntimeError, x: Tensor) -> bool:
    """Check whether a call on the device of `x` can continue in smaller steps after an error.

    It can if memory ran out, but not while a graph is recorded, which would have all steps in it.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
