"""A check of the stages in Triton against torch on this machine, before they are used.

It runs a stream with random weights and inputs of a real call's sizes. There are more classes than fit in a
tile or in a step of a kernel's loop, in two chunks, whose state is slices of a larger tensor. A few different
classes are repeated, so that torch computes only these, while every class is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.engine import torch_stages
from catseg_fast.engine.class_memory import ClassMemory, LinearMemory
from catseg_fast.engine.folding import ClassLayer, Plan, WindowBlock, cast, map_tensors
from catseg_fast.engine.precision import tf32
from catseg_fast.engine.schedule import Schedule
from catseg_fast.engine.streaming import Stream
from catseg_fast.engine.terms import BlockGuidance, ImageTerms, VocabularyTerms
from catseg_fast.kernels.launch.op import Random

if TYPE_CHECKING:
    from catseg_fast.engine.triton_stages import TritonStages

Resolution = tuple[int, int]
Guidance = tuple[Tensor, Tensor]

CROPS = 2  # at most
CHUNK, CLASSES = 97, 130
DIFFERENT = 7  # divides no tile, so that a class has many positions in tiles

# Largest accepted error, relative to plain torch's in the same type. For correct kernels it is below 2, over
# more values than here (`tests/support/accuracy.py`).
FACTOR = 4.0


def random_plan(plan: Plan) -> Plan:
    """Return a plan of random weights with the sizes and the type of another plan."""
    random = Random(plan.embed.dtype, plan.embed.device, seed=0)

    def draw(x: Tensor) -> Tensor:
        scale = 0.3 if x.ndim == 1 else (x.numel() / len(x)) ** -0.5
        return torch.empty_like(x).copy_(random.normal(*x.shape, scale=scale))

    drawn: Plan = map_tensors(draw, plan)
    return drawn


def wrong_stages(candidate: TritonStages, image: ImageTerms, direct: bool) -> dict[str, str]:
    """Run each stage of a stream twice, against torch in fp32 or float64.

    Args:
        candidate: the stages, for the weights of `random_plan`.
        image: image terms of a call, for the sizes.
        direct: whether the call convolves the cost volume directly, not in the Fourier domain.

    Returns:
        The faults by stage ("embed_cost_volume", "window_block", "class_attention", "decode"). A stage that
        overflows in torch, too, is not compared.
    """
    checker = _Checker(candidate)
    with tf32(False):
        run_stream(checker, candidate.plan, image, direct)
    return checker.wrong


@torch.no_grad()
def run_stream(stages: Any, plan: Plan, image: ImageTerms, direct: bool) -> None:
    """Run the stream of the check with some stages."""
    image = _random_image(image.of(slice(0, CROPS)))
    vocabulary = _vocabulary(plan, image)
    schedule = Schedule("resident", CHUNK, "the self check", 0, 0, 0)
    flag = None
    if plan.embed.dtype == torch.float16:
        flag = torch.zeros(1, dtype=torch.int32, device=image.features.device)
    stream = Stream(stages, plan, image, vocabulary, None, schedule, flag=flag)
    if stream.spectra is not None and direct:
        assert vocabulary.unit is not None
        stages.embed_cost_volume(plan, image.features, vocabulary.unit[:, :CHUNK], image.resolution)
    stream.run(lambda classes, logits: None)


def _random_image(image: ImageTerms) -> ImageTerms:
    """Return random terms with the layout of an image's terms."""
    random = Random(image.features.dtype, image.features.device, seed=2)

    def draw(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(random.normal(*x.shape))

    def guide(block: BlockGuidance) -> BlockGuidance:
        return dataclasses.replace(block, query_key=draw(block.query_key))

    return ImageTerms(
        image.resolution,
        F.normalize(draw(image.features), dim=-1),
        tuple((guide(first), guide(second)) for first, second in image.blocks),
        (draw(image.decoder[0]), draw(image.decoder[1])),
    )


def _vocabulary(plan: Plan, image: ImageTerms) -> VocabularyTerms:
    """Return random terms of `CLASSES` classes, of which `DIFFERENT` are different."""
    device = image.features.device
    random = Random(plan.embed.dtype, device, seed=1)
    which = torch.arange(CLASSES, device=device) % DIFFERENT

    def draw() -> Tensor:
        return random.normal(1, DIFFERENT, plan.channels)[:, which]

    unit = random.unit(1, DIFFERENT, plan.prompts, image.features.shape[2])[:, which]
    texts = [[None if layer.classes.text is None else draw() for _ in range(2)] for layer in plan.layers]
    queries, keys = zip(*texts, strict=True) if texts else ((), ())
    return VocabularyTerms(unit, torch.ones(unit.shape[:3], device=device), unit, queries, keys)


class _Checker:
    """Stages that run a candidate's stages twice, compare the results, and return torch's results."""

    def __init__(self, candidate: TritonStages) -> None:
        self._candidate = candidate
        self._dtype = candidate.plan.embed.dtype
        self._exact = torch.float64 if self._dtype == torch.float32 else torch.float32
        self.collects_at_once, self.repeats = candidate.collects_at_once, False
        self.wrong: dict[str, str] = {}

    def embed_cost_volume(self, plan: Plan, image: Tensor, text: Tensor, resolution: Resolution) -> Tensor:
        def run(stages: Any, text: Tensor, plan: Plan, image: Tensor) -> Tensor:
            result: Tensor = stages.embed_cost_volume(plan, image, text, resolution)
            return result

        return self._by_class("embed_cost_volume", run, (text,), plan, image)

    def window_block(
        self, block: WindowBlock, guidance: BlockGuidance, x: Tensor, out: Tensor | None = None
    ) -> Tensor:
        def run(stages: Any, x: Tensor, block: WindowBlock, guidance: BlockGuidance) -> Tensor:
            to = out if stages is self._candidate else None
            result: Tensor = stages.window_block(block, guidance, x, to)
            return result

        result = self._by_class("window_block", run, (x,), block, guidance)
        return result if out is None else out.copy_(result)

    def class_collect(
        self,
        layer: ClassLayer,
        memory: ClassMemory,
        x: Tensor,
        key: Tensor | None,
        resolution: Resolution,
        last: bool = False,
    ) -> None:
        if not isinstance(memory, LinearMemory):  # the only one with a kernel
            torch_stages.class_collect(layer, memory, x, key, resolution, last)
            return

        def run(stages: Any, memory: LinearMemory, given: Any, *parts: slice) -> tuple[Tensor, ...]:
            layer, x, key = given
            for part in parts:
                text, end = None if key is None else key[:, part], part is parts[-1]
                stages.class_collect(layer, memory, x[:, part], text, resolution, last and end)
            sums = (memory.means, memory.key_value, memory.key_sum)
            return tuple(x for x in sums if isinstance(x, Tensor))

        given, copy = (layer, x, key), dataclasses.replace
        whole, parts = (slice(0, None),), (slice(0, CHUNK), slice(CHUNK, None))
        exact = cast(memory, self._exact)
        truth = run(torch_stages, exact, cast(given, self._exact), *whole)
        if "class_attention" not in self._candidate.fallbacks:
            eager = run(torch_stages, copy(memory), given, *whole)
            runs = [run(self._candidate, copy(memory), given, *whole) for _ in range(2)]
            if x.shape[1] > CHUNK:
                runs += [run(self._candidate, copy(memory), given, *parts) for _ in range(2)]
            for ours, again in zip(runs[::2], runs[1::2], strict=True):
                for mine, other, theirs, exactly in zip(ours, again, eager, truth, strict=True):
                    self._compare("class_attention", mine, other, _error(theirs, exactly), exactly)
        memory.means = None if exact.means is None else exact.means.to(self._dtype)
        memory.key_value, memory.key_sum = (
            sums.float() if isinstance(sums, Tensor) else sums for sums in (exact.key_value, exact.key_sum)
        )

    def class_apply(
        self,
        layer: ClassLayer,
        x: Tensor,
        query: Tensor | None,
        memory: ClassMemory,
        resolution: Resolution,
    ) -> Tensor:
        def run(
            stages: Any, x: Tensor, query: Tensor | None, layer: ClassLayer, memory: ClassMemory
        ) -> Tensor:
            result: Tensor = stages.class_apply(layer, x, query, memory, resolution)
            return result

        if not isinstance(memory, LinearMemory):
            return torch_stages.class_apply(layer, x, query, memory, resolution)
        return self._by_class("class_attention", run, (x, query), layer, memory)

    def decode(
        self,
        plan: Plan,
        guidance: Guidance,
        x: Tensor,
        resolution: Resolution,
        out: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> Tensor:
        def run(stages: Any, x: Tensor, plan: Plan, guidance: Guidance) -> Tensor:
            own = stages is self._candidate
            to, raised = (out, flag) if own else (None, None)
            result: Tensor = stages.decode(plan, guidance, x, resolution, to, raised)
            if own and flag is not None and bool(flag):
                self.wrong["decode"] = "it reports infinite values, but there are none"
            return result

        return self._by_class("decode", run, (x,), plan, guidance)

    def _by_class(
        self, stage: str, run: Callable[..., Tensor], classes: tuple[Tensor | None, ...], *others: Any
    ) -> Tensor:
        """Check a stage that computes each class independently; return torch's result.

        Args:
            run: takes stages and the following arguments.
            classes: arguments by class, `[B, t, …]`.
            others: the other arguments.
        """
        few = tuple(None if x is None else x[:, :DIFFERENT] for x in classes)
        truth = run(torch_stages, *cast((*few, *others), self._exact))
        count = next(x.shape[1] for x in classes if x is not None)
        which = torch.arange(count, device=truth.device) % DIFFERENT
        if stage not in self._candidate.fallbacks:
            allowed = _error(run(torch_stages, *few, *others), truth)
            ours = run(self._candidate, *classes, *others).clone()  # the next run may overwrite it
            again = run(self._candidate, *classes, *others)
            self._compare(stage, ours, again, allowed, truth[:, which])
        return truth.to(self._dtype)[:, which]

    def _compare(self, stage: str, ours: Tensor, again: Tensor, allowed: float, truth: Tensor) -> None:
        if stage in self.wrong:
            return
        if not torch.equal(ours.view(torch.uint8), again.view(torch.uint8)):
            self.wrong[stage] = "two runs differ"
            return
        found = _error(ours, truth)
        if FACTOR * allowed < float("inf") and not found <= FACTOR * allowed:
            self.wrong[stage] = f"error {found:.1e}, torch's is {allowed:.1e}"


def _error(x: Tensor, truth: Tensor) -> float:
    return (x.to(truth.dtype) - truth).abs().max().item()
