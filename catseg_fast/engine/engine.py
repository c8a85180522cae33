"""The engine: an aggregator's folded weights, and calls that stream over classes."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from catseg_fast.backend import choose_backend, warn_once
from catseg_fast.engine import fourier, torch_stages
from catseg_fast.engine.folding import Plan, build_plan
from catseg_fast.engine.gradients import GradientStream
from catseg_fast.engine.precision import compute_dtype
from catseg_fast.engine.recording import GraphCache, ambient_settings
from catseg_fast.engine.schedule import Schedule, Sizes, plan_gradients
from catseg_fast.engine.schedule_cache import ScheduleCache
from catseg_fast.engine.selection import best_classes, class_scores
from catseg_fast.engine.settings import EngineSettings
from catseg_fast.engine.stages import Stages
from catseg_fast.engine.streaming import Consumer, Stream, run_streams
from catseg_fast.engine.terms import ImageTerms, VocabularyTerms, image_terms, vocabulary_terms
from catseg_fast.engine.whole_call import Answer, run_call
from catseg_fast.errors import RunError
from catseg_fast.weights import WeightsState, module_tensors

if TYPE_CHECKING:
    from catseg_fast.engine.triton_stages import TritonStages


class Engine(EngineSettings):
    """Runs an aggregator, streaming over classes.

    Args:
        aggregator: a `catseg_fast.reference.Aggregator`, or an object built like upstream's. Its weights are
            read at every call, so that changes take effect.
    """

    def __init__(self, aggregator: nn.Module) -> None:
        super().__init__()
        self.aggregator: Any = aggregator
        self.forget()

    def forget(self) -> None:
        """Clear everything that is derived from weights, calls or settings."""
        self._plans: dict[torch.dtype, tuple[object, Plan]] = {}
        self._triton: dict[torch.dtype, TritonStages] = {}
        self._vocabulary: tuple[object, Plan, VocabularyTerms] | None = None
        self._schedules = ScheduleCache()
        self.recordings = GraphCache()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which is the settings."""
        derived = ("_plans", "_triton", "_vocabulary", "_schedules", "recordings")
        return {name: value for name, value in vars(self).items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget()

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        """Return the folded weights, in the given type or that of the next call.

        They are cached until a weight or buffer changes, except when gradients are recorded.
        """
        dtype = dtype or self._compute_dtype()
        if self._differentiable() or torch.compiler.is_compiling():
            with self._without_autocast():
                return build_plan(self.aggregator, dtype)
        state = WeightsState(module_tensors(self.aggregator, buffers=True))
        if dtype not in self._plans or self._plans[dtype][0] != state:
            # The cached plan must be usable by later calls in any mode.
            with torch.inference_mode(False), torch.no_grad(), self._without_autocast():
                self._plans[dtype] = (state, build_plan(self.aggregator, dtype))
        return self._plans[dtype][1]

    def vocabulary(
        self, text_feats: Tensor, max_classes: int | None, plan: Plan | None = None
    ) -> VocabularyTerms:
        """Return the terms of `text_feats [B or 1, T, P, F]`, for the next call or a call with `plan`."""
        selects = max_classes is not None and self._total(text_feats.shape[1]) > max_classes
        plan = plan or self.plan()
        with self._without_autocast():
            return vocabulary_terms(self.aggregator, plan, text_feats, selects)

    def _kept_vocabulary(self, text_feats: Tensor, max_classes: int | None, plan: Plan) -> VocabularyTerms:
        """Return the terms of the last call, if it had the same text tensor, unchanged since."""
        if self._differentiable(text_feats) or torch.compiler.is_compiling() or text_feats.is_inference():
            return self.vocabulary(text_feats, max_classes, plan)
        # The terms hold the text's storage, so that its address is not reused by another tensor.
        place = (text_feats.data_ptr(), text_feats.device, text_feats.dtype, text_feats._version)
        key = (place, text_feats.shape, text_feats.stride(), max_classes)
        kept = self._vocabulary
        if kept is None or kept[0] != key or kept[1] is not plan:
            kept = self._vocabulary = (key, plan, self.vocabulary(text_feats, max_classes, plan))
        return kept[2]

    def logits(
        self,
        img_feats: Tensor,
        text_feats: Tensor,
        appearance_guidance: Sequence[Tensor | None],
        max_classes: int | None,
    ) -> Tensor:
        """Return all logits `[B, T, 4H, 4W]` in one tensor; arguments as in `stream`.

        Their type is that of autocast or `precision`, if set, else that of the weights.

        Raises:
            RunError: if the classes are split over processes.
        """
        if self.share is not None:
            raise RunError("class parallel: no rank has all logits; only label maps are available")
        plan = self.plan()
        vocabulary = self._kept_vocabulary(text_feats, max_classes, plan)
        (B, _, H, W), T = img_feats.shape, text_feats.shape[1]
        if self._differentiable(img_feats, text_feats, *appearance_guidance):
            chunks: list[Tensor] = []

            def keep(_: slice, part: Tensor) -> None:
                chunks.append(part)

            self.stream(img_feats, vocabulary, appearance_guidance, max_classes, lambda: keep, plan)
            return torch.cat(chunks, dim=1)
        asked = self.precision is not None or torch.is_autocast_enabled(img_feats.device.type)
        dtype = self._compute_dtype() if asked else self.aggregator.conv1.weight.dtype
        output_bytes = B * T * 16 * H * W * dtype.itemsize
        schedule: Schedule | None = None

        def run(img_feats: Tensor, *maps: Tensor) -> Tensor:
            answer = Answer(img_feats.new_empty((B, T, 4 * H, 4 * W), dtype=dtype))
            given = iter(maps)
            guidance = [None if x is None else next(given) for x in appearance_guidance]
            self.stream(img_feats, vocabulary, guidance, max_classes, lambda: answer, plan, schedule)
            return answer.logits

        inputs = [img_feats, *(x for x in appearance_guidance if x is not None)]
        logits, key = None, None
        if self.may_record(img_feats.device):
            guided = tuple(x is not None for x in appearance_guidance)
            key = ("logits", guided, max_classes, dtype, self.recording_key(plan, vocabulary))
            logits = self.recordings.replay(key, inputs, Tensor.clone)
        if logits is None:
            schedule = self.schedule_of(plan, img_feats, vocabulary, max_classes, output_bytes)
            if key is None or schedule.policy == "offload":
                return run(*inputs)
            logits = self.recordings(key, inputs, run, Tensor.clone)
        if bool(logits.isfinite().all()):
            return logits
        # A call that overflows fp16 is computed again, which a recording cannot do.
        schedule = self.schedule_of(plan, img_feats, vocabulary, max_classes, output_bytes)
        return run(*inputs)

    def may_record(self, device: torch.device) -> bool:
        """Check whether a call may be answered by a recording, unless its state is offloaded."""
        if self.graphs == "off" or self.share is not None:
            return False
        return self.recordings.serves(device) and not self._differentiable()

    def recording_key(self, plan: Plan, vocabulary: VocabularyTerms) -> object:
        """Return everything that a recorded run of the stages depends on besides its inputs.

        The schedule is not part of it: a recording holds its memory, and what is free no longer matters.
        """
        settings = (self.backend, self.input_precision, self.policy, self.chunk, self.memory_budget)
        ambient = ambient_settings(self.aggregator.conv1.weight.device)
        return (weakref.ref(plan), weakref.ref(vocabulary), settings, ambient)

    def stream(
        self,
        img_feats: Tensor,
        vocabulary: VocabularyTerms,
        appearance_guidance: Sequence[Tensor | None],
        max_classes: int | None,
        begin: Callable[[], Consumer],
        plan: Plan | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """Compute the logits of all classes, chunk by chunk in ascending order.

        A call that overflows fp16 is computed again in bf16, with a warning; not if gradients are recorded,
        as their scaling is up to the caller.

        Args:
            img_feats: image features `[B, F, H, W]`.
            vocabulary: terms from `vocabulary`, for the same weights.
            appearance_guidance: upstream's three guidance maps.
            max_classes: the most classes to aggregate per crop; None for all.
            begin: returns a function that is called with a slice of classes and their logits
                `[B, t, 4H, 4W]`. If memory runs out in it, it is called again, so it must change nothing
                before that can happen. If the whole call is computed again, `begin` is called again first.
            plan: the folded weights, if the caller has them.
            schedule: from `schedule_of`; by default one for a caller that holds no further memory.

        Raises:
            InputError: if the memory budget is too small for one class.
            RunError: if gradients are required of classes that are split over processes.
        """
        inputs = (img_feats, vocabulary, appearance_guidance, max_classes)
        if self._stream(plan or self.plan(), *inputs, begin, schedule):
            return
        given = (img_feats, vocabulary.features, *appearance_guidance)
        if self._all_ranks(all(x is None or bool(x.isfinite().all()) for x in given)):
            warnings.warn("fp16 overflowed: computing again in bf16", RuntimeWarning, stacklevel=2)
            plan = self.plan(torch.bfloat16)
            vocabulary = self.vocabulary(vocabulary.features, max_classes, plan)
            self._stream(plan, img_feats, vocabulary, appearance_guidance, max_classes, begin, schedule)

    def _stream(
        self,
        plan: Plan,
        img_feats: Tensor,
        vocabulary: VocabularyTerms,
        appearance_guidance: Sequence[Tensor | None],
        max_classes: int | None,
        begin: Callable[[], Consumer],
        schedule: Schedule | None,
    ) -> bool:
        """Run the stages; return whether all logits are finite, which is only checked in fp16."""
        total = self._total(vocabulary.classes)
        count = total if max_classes is None else min(total, max_classes)
        differentiable = self._differentiable(img_feats, vocabulary.features, *appearance_guidance)
        if differentiable and self.share is not None:
            raise RunError("class parallel: no gradients pass between ranks; call under torch.no_grad()")
        if schedule is None or differentiable:
            schedule = self.schedule_of(plan, img_feats, vocabulary, max_classes, 0, differentiable)
        device = img_feats.device  # streams and kernels use the current one
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, torch.set_grad_enabled(differentiable), self._without_autocast():
            image = image_terms(self.aggregator, plan, img_feats, appearance_guidance)
            if differentiable:
                if self.backend == "triton":
                    warn_once(
                        "gradients are required: running in torch, as Triton's kernels have no backward"
                    )
                selected = None
                if count < total:
                    selected = best_classes(class_scores(img_feats, vocabulary), count)
                GradientStream(torch_stages, plan, image, vocabulary, selected, schedule).run(begin())
                return True

            def streams(flag: Tensor | None) -> list[Stream]:
                return self._streams(plan, image, img_feats, vocabulary, count, schedule, flag)

            watched = plan.embed.dtype == torch.float16 and not _recording(device)
            flag = torch.zeros(1, dtype=torch.int32, device=device) if watched else None
            self._get_ready(
                plan,
                image,
                count,
                lambda: run_streams(streams(None if flag is None else flag.clone()), begin()),
            )
            run_call(streams(flag), begin())
            return flag is None or self._all_ranks(not bool(flag))

    def schedule_of(
        self,
        plan: Plan,
        img_feats: Tensor,
        vocabulary: VocabularyTerms,
        max_classes: int | None,
        output_bytes: int,
        differentiable: bool = False,
    ) -> Schedule:
        """Return the schedule of a call with these arguments, if the caller also holds `output_bytes`.

        Raises:
            InputError: if the memory budget is too small for one class.
        """
        total = self._total(vocabulary.classes)
        count = total if max_classes is None else min(total, max_classes)
        B, _, H, W = img_feats.shape
        held = min(count, vocabulary.classes)
        sizes = Sizes(plan, B, (H, W), held, img_feats.device, count < total)
        return self._schedule(sizes, output_bytes, differentiable)

    def schedule(
        self,
        crops: int,
        resolution: tuple[int, int],
        classes: int,
        output_bytes: int = 0,
        selects: bool = False,
        plan: Plan | None = None,
    ) -> Schedule:
        """Return the schedule of a call that aggregates `classes` classes, selected from more if `selects`.

        `plan` is the folded weights, if the caller has them.

        Raises:
            InputError: if the memory budget is too small for one class.
        """
        device: torch.device = self.aggregator.conv1.weight.device
        sizes = Sizes(plan or self.plan(), crops, resolution, classes, device, selects)
        return self._schedule(sizes, output_bytes, self._differentiable())

    def _schedule(self, sizes: Sizes, output_bytes: int, differentiable: bool) -> Schedule:
        chunk, budget = self.chunk, self.memory_budget
        if differentiable:
            return plan_gradients(sizes, checkpoint=self.checkpoint, chunk=chunk, budget=budget)
        return self._schedules(
            sizes, policy=self.policy, chunk=chunk, budget=budget, output_bytes=output_bytes
        )

    def stages(self, plan: Plan) -> Stages:
        """Return the stages of calls without gradients."""
        if constant_backend(self.backend, self.aggregator.conv1.weight.device) != "triton":
            return torch_stages
        from catseg_fast.engine.triton_stages import TritonStages  # triton exists for Linux only

        kept = self._triton.get(plan.embed.dtype)
        if kept is None or kept.plan is not plan or kept.input_precision != self.input_precision:
            kept = TritonStages(plan, self.input_precision)
            self._triton[plan.embed.dtype] = kept
        return kept

    def _get_ready(self, plan: Plan, image: ImageTerms, count: int, call: Callable[[], object]) -> None:
        """Compile and check the kernels of a call before the first call of its kind on a GPU.

        The interpreter is skipped: it is slow and proves nothing about a GPU.
        """
        device = image.features.device
        if device.type != "cuda" or _recording(device):
            return
        stages = self.stages(plan)
        if stages is torch_stages:
            return
        from catseg_fast.engine.first_call import get_ready  # triton exists for Linux only

        # The ranks of a share would wait for each other in the call.
        direct = not fourier.pays_off(plan, image.crops * count)
        get_ready(stages, image, direct, call if self.share is None else None)  # type: ignore[arg-type]

    def _streams(
        self,
        plan: Plan,
        image: ImageTerms,
        img_feats: Tensor,
        vocabulary: VocabularyTerms,
        count: int,
        schedule: Schedule,
        flag: Tensor | None,
    ) -> list[Stream]:
        """Return the streams that aggregate `count` classes per crop.

        There is a single one, except where the best classes of a share are selected: then there is one per
        crop, as ranks hold different numbers of them.
        """
        stages, share = self.stages(plan), self.share
        parts: list[tuple[ImageTerms, Tensor | None]] = [(image, None)]
        if count < self._total(vocabulary.classes):
            scores = class_scores(img_feats, vocabulary)
            if share is None:
                parts = [(image, best_classes(scores, count))]
            else:
                kept = share.select(scores, count)
                parts = [(image.of(slice(crop, crop + 1)), own) for crop, own in enumerate(kept)]
        common = (schedule, share, count, flag)
        return [Stream(stages, plan, crops, vocabulary, own, *common) for crops, own in parts]

    def _total(self, classes: int) -> int:
        """Return the number of classes of all ranks, if this rank has `classes`."""
        return classes if self.share is None else self.share.total

    def _all_ranks(self, flag: bool) -> bool:
        """Check whether a flag is set on all ranks."""
        return flag if self.share is None else self.share.all_true(flag, self.aggregator.conv1.weight.device)

    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, self.aggregator.conv1.weight)

    def _without_autocast(self) -> torch.autocast:
        """Return a context without autocast, as the stages choose their types themselves."""
        return torch.autocast(self.aggregator.conv1.weight.device.type, enabled=False)

    def _differentiable(self, *inputs: Tensor | None) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = itertools.chain(inputs, self.aggregator.parameters())
        return any(x is not None and x.requires_grad for x in tensors)


# `torch.compile` treats this as a constant, since it cannot trace the queries of the machine. All that
# torch.compiler.assume_constant_result does is to set this, but it imports the whole compiler first.
constant_backend = choose_backend
constant_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _recording(device: torch.device) -> bool:
    """Check whether a graph of the call is being made, so that no value on the GPU can be read."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
