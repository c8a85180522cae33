"""The engine: an aggregator's folded weights, its memory settings, and calls that stream over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catseg_fast import stages as torch_stages
from catseg_fast.backend import choose_backend
from catseg_fast.plan import Plan, build_plan
from catseg_fast.planner import Schedule, Sizes, check_chunk, check_policy, parse_bytes, plan_schedule
from catseg_fast.precision import pays_off_on_cpu
from catseg_fast.streaming import Consumer, Stages, Stream
from catseg_fast.terms import VocabularyTerms, chunk_text, image_terms, vocabulary_terms
from catseg_fast.weights import weights_state


class Engine:
    """Runs an aggregator, streaming over classes.

    Args:
        aggregator: a `catseg_fast.reference.Aggregator`, or an object built like upstream's. Its weights are
            read at every call; a change takes effect.

    Attributes:
        backend: "auto", "triton" or "torch"; calls that need gradients run in torch always.
        precision: type in which the stages compute; None for the weights' own, or autocast's. On a CPU,
            autocast has its way where its type is faster (`catseg_fast.precision`).
    """

    def __init__(self, aggregator: nn.Module) -> None:
        self.aggregator: Any = aggregator
        self.backend = "auto"
        self.precision: torch.dtype | None = None
        self._chunk: int | None = None
        self._policy: str | None = None
        self._memory_budget: int | None = None
        self._plan: tuple[object, Plan] | None = None

    @property
    def chunk(self) -> int | None:
        """Classes a step; None lets the planner choose."""
        return self._chunk

    @chunk.setter
    def chunk(self, chunk: int | None) -> None:
        self._chunk = check_chunk(chunk)

    @property
    def policy(self) -> str | None:
        """ "resident", "offload" or "recompute"; None lets the planner choose."""
        return self._policy

    @policy.setter
    def policy(self, policy: str | None) -> None:
        self._policy = check_policy(policy)

    @property
    def memory_budget(self) -> int | None:
        """Bytes that a call may take above weights and inputs (may be set as "2GiB"); None: what is free."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, budget: int | str | None) -> None:
        self._memory_budget = None if budget is None else parse_bytes(budget)

    def plan(self) -> Plan:
        """The folded weights; kept until a weight changes, except where gradients are wanted."""
        dtype = self._compute_dtype()
        if self._differentiable():
            with self._without_autocast():
                return build_plan(self.aggregator, dtype)
        state = (dtype, weights_state(self.aggregator.parameters()))
        if self._plan is None or self._plan[0] != state:
            # Whatever mode the call is in, what is kept must serve every later one.
            with torch.inference_mode(False), torch.no_grad(), self._without_autocast():
                self._plan = (state, build_plan(self.aggregator, dtype))
        return self._plan[1]

    def vocabulary(self, text_feats: Tensor, max_classes: int | None) -> VocabularyTerms:
        """What depends on `text_feats [B or 1, T, P, F]` alone."""
        selects = max_classes is not None and text_feats.shape[1] > max_classes
        plan = self.plan()
        with self._without_autocast():
            return vocabulary_terms(self.aggregator, plan, text_feats, selects)

    def logits(
        self,
        img_feats: Tensor,
        text_feats: Tensor,
        appearance_guidance: Sequence[Tensor | None],
        max_classes: int | None,
    ) -> Tensor:
        """All logits `[B, T, 4H, 4W]` in one tensor; arguments as in `stream`."""
        vocabulary = self.vocabulary(text_feats, max_classes)
        (B, _, H, W), T = img_feats.shape, text_feats.shape[1]
        shape = (B, T, 4 * H, 4 * W)
        if self._differentiable(img_feats, text_feats, *appearance_guidance):
            chunks: list[Tensor] = []
            self.stream(
                img_feats, vocabulary, appearance_guidance, max_classes, lambda _, part: chunks.append(part)
            )
            return torch.cat(chunks, dim=1)
        logits = img_feats.new_empty(shape, dtype=self._compute_dtype())

        def store(classes: slice, part: Tensor) -> None:
            logits[:, classes] = part

        self.stream(img_feats, vocabulary, appearance_guidance, max_classes, store, logits.nbytes)
        return logits

    def stream(
        self,
        img_feats: Tensor,
        vocabulary: VocabularyTerms,
        appearance_guidance: Sequence[Tensor | None],
        max_classes: int | None,
        consume: Consumer,
        output_bytes: int = 0,
    ) -> None:
        """Compute the logits of all classes, chunk by chunk in ascending order.

        Args:
            img_feats: `[B, F, H, W]`.
            vocabulary: from `vocabulary`, for the same weights.
            appearance_guidance: upstream's three guidance maps.
            max_classes: aggregate at most so many classes a crop; None for all.
            consume: called with a slice of classes and their logits `[B, t, 4H, 4W]`. It must change nothing
                before it can no longer fail for want of memory: it may then be called again.
            output_bytes: what the caller holds besides, for the planner.

        Raises:
            ValueError: if the memory budget is too small for one class.
        """
        plan, total = self.plan(), vocabulary.classes
        count = total if max_classes is None else min(total, max_classes)
        resolution = (img_feats.shape[2], img_feats.shape[3])
        schedule = self.schedule(len(img_feats), resolution, count, output_bytes)
        differentiable = self._differentiable(img_feats, vocabulary.features, *appearance_guidance)
        stages = torch_stages if differentiable else self.stages(plan)
        on_device = torch.cuda.device_of(img_feats)  # streams and kernels go to the current one
        with on_device, torch.set_grad_enabled(differentiable), self._without_autocast():
            image = image_terms(self.aggregator, plan, img_feats, appearance_guidance)
            selected = self._select(img_feats, vocabulary, count) if count < total else None
            Stream(stages, plan, image, vocabulary, selected, schedule, differentiable).run(consume)

    def schedule(
        self, crops: int, resolution: tuple[int, int], classes: int, output_bytes: int = 0
    ) -> Schedule:
        """How a call would run that aggregates so many classes.

        Raises:
            ValueError: if the memory budget is too small for one class.
        """
        device: torch.device = self.aggregator.conv1.weight.device
        return plan_schedule(
            Sizes(self.plan(), crops, resolution, classes, device),
            policy=self.policy,
            chunk=self.chunk,
            budget=self.memory_budget,
            output_bytes=output_bytes,
        )

    def stages(self, plan: Plan) -> Stages:
        """What runs the stages where no gradients are wanted."""
        if choose_backend(self.backend, self.aggregator.conv1.weight.device) != "triton":
            return torch_stages
        from catseg_fast.triton_stages import TritonStages  # triton exists for Linux alone

        return TritonStages(plan)

    def _select(self, img_feats: Tensor, vocabulary: VocabularyTerms, count: int) -> Tensor:
        """`catseg_fast.reference.select_classes`, without the whole cost volume: indices `[B, count]`."""
        precise = torch.promote_types(img_feats.dtype, torch.float32)
        image = F.normalize(img_feats.to(precise), dim=1).flatten(2)
        scores = []
        for start in range(0, vocabulary.classes, 64):
            part = slice(start, start + 64)
            text = chunk_text(vocabulary.features[:, part], vocabulary.inverse_norm[:, part], precise)
            cosines = text.flatten(1, 2) @ image  # B, t*P, HW
            scores.append(cosines.amax(dim=-1).unflatten(1, (-1, text.shape[2])).amax(dim=-1))
        return torch.cat(scores, dim=1).topk(count, dim=-1).indices.sort(dim=-1).values

    def _compute_dtype(self) -> torch.dtype:
        weight: Tensor = self.aggregator.conv1.weight
        if self.precision is not None:
            return self.precision
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            if device != "cpu" or pays_off_on_cpu(dtype):
                return dtype
        return weight.dtype

    def _without_autocast(self) -> torch.autocast:
        """The stages choose their types themselves."""
        return torch.autocast(self.aggregator.conv1.weight.device.type, enabled=False)

    def _differentiable(self, *inputs: Tensor | None) -> bool:
        tensors = (*inputs, *self.aggregator.parameters())
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
