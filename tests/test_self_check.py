"""The check of kernels before they are trusted, on planted faults, in torch or the interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast.engine import self_check, torch_stages
from catseg_fast.engine.class_memory import LinearMemory
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.self_check import CHUNK, random_plan, wrong_stages
from catseg_fast.engine.triton_stages import TritonStages
from catseg_fast.kernels.decoder import op as decoder
from support.engines import make_terms

STAGES = ("embed_cost_volume", "window_block", "class_collect", "class_apply", "decode")
REPORTED = {"class_collect": "class_attention", "class_apply": "class_attention"}


class Planted:
    """Stages in torch, one of which has a fault.

    Args:
        plan: the weights.
        stage: the one with the fault.
        fault: takes its result `[B, t, …]`, whether the chunk is not the first, and the number of the run.
    """

    def __init__(self, plan: Plan, stage: str = "", fault: Any = None, at_once: bool = True) -> None:
        self.plan, self.collects_at_once, self.repeats = plan, at_once, False
        self.fallbacks: dict[str, str] = {}
        self._stage, self._fault, self.runs = stage, fault, 0

    def _spoil(self, stage: str, result: Tensor, later: bool) -> Tensor:
        self.runs += 1
        return self._fault(result, later, self.runs) if stage == self._stage else result

    def embed_cost_volume(self, plan: Plan, image: Tensor, text: Tensor, resolution: Any) -> Tensor:
        result = torch_stages.embed_cost_volume(plan, image, text, resolution)
        return self._spoil("embed_cost_volume", result, bool(text.storage_offset() > 0))

    def window_block(self, block: Any, guidance: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
        result = torch_stages.window_block(block, guidance, x)
        result = self._spoil("window_block", result, x.shape[1] < CHUNK)
        return result if out is None else out.copy_(result)

    def class_collect(
        self, layer: Any, memory: LinearMemory, x: Tensor, key: Any, resolution: Any, last: bool = False
    ) -> None:
        later = isinstance(memory.key_sum, Tensor) and memory.key_sum.ndim == 4
        torch_stages.class_collect(layer, memory, x, key, resolution, False)
        assert isinstance(memory.key_sum, Tensor)
        # By position instead of by class, as sums have no classes.
        memory.key_sum = self._spoil("class_collect", memory.key_sum, later or x.shape[1] > CHUNK)
        if last:
            memory.close(x.dtype)

    def class_apply(self, layer: Any, x: Tensor, query: Any, memory: Any, resolution: Any) -> Tensor:
        result = torch_stages.class_apply(layer, x, query, memory, resolution)
        return self._spoil("class_apply", result, bool(x.storage_offset() > 0))

    def decode(
        self, plan: Plan, guidance: Any, x: Tensor, resolution: Any, out: Any = None, flag: Any = None
    ) -> Tensor:
        result = torch_stages.decode(plan, guidance, x, resolution, out, flag)
        return self._spoil("decode", result, x.shape[1] < CHUNK)


def later_chunks(result: Tensor, later: bool, run: int) -> Tensor:
    return result * 1.001 if later else result


def beyond_64_classes(result: Tensor, later: bool, run: int) -> Tensor:
    wrong = result.clone()
    wrong[:, 64:] *= 1.001
    return wrong


def one_class(result: Tensor, later: bool, run: int) -> Tensor:
    wrong = result.clone()
    wrong[:, 80:81] *= 1.001
    return wrong


def one_bit_from_run_to_run(result: Tensor, later: bool, run: int) -> Tensor:
    wrong = result.clone()
    wrong.view(-1)[17 if result.is_contiguous() else 0 :][:1] *= 1 + 2.0**-23 * (run % 2)
    return wrong


@pytest.mark.parametrize("at_once", [True, False])
def test_torch_itself_passes(at_once: bool) -> None:
    plan, image = make_terms()
    candidate = Planted(random_plan(plan), at_once=at_once)
    assert wrong_stages(candidate, image, direct=True) == {}  # type: ignore[arg-type]
    assert candidate.runs > 20


@pytest.mark.parametrize(
    ("stage", "at_once"), [*((stage, True) for stage in STAGES), ("class_collect", False)]
)
def test_finds_what_is_wrong_only_from_the_second_chunk_on(stage: str, at_once: bool) -> None:
    plan, image = make_terms()
    candidate = Planted(random_plan(plan), stage, later_chunks, at_once)
    found = wrong_stages(candidate, image, direct=True)  # type: ignore[arg-type]
    assert list(found) == [REPORTED.get(stage, stage)]
    assert "error" in found.popitem()[1]


@pytest.mark.parametrize("fault", [beyond_64_classes, one_class])
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "class_collect"])
def test_finds_what_is_wrong_only_in_some_classes(stage: str, fault: Any) -> None:
    plan, image = make_terms()
    found = wrong_stages(Planted(random_plan(plan), stage, fault), image, direct=True)  # type: ignore[arg-type]
    assert list(found) == [REPORTED.get(stage, stage)]


@pytest.mark.parametrize("stage", STAGES)
def test_finds_what_differs_from_run_to_run(stage: str) -> None:
    plan, image = make_terms()
    candidate = Planted(random_plan(plan), stage, one_bit_from_run_to_run)
    found = wrong_stages(candidate, image, direct=True)  # type: ignore[arg-type]
    assert found == {REPORTED.get(stage, stage): "two runs differ"}


def test_looks_at_what_a_plan_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost volume's kernels only run for few classes, if there are many prompts."""
    monkeypatch.setattr("catseg_fast.engine.fourier.LEAST_PROMPTS", 3)
    plan, image = make_terms()
    candidate = Planted(random_plan(plan), "embed_cost_volume", beyond_64_classes)
    assert wrong_stages(candidate, image, direct=False) == {}  # type: ignore[arg-type]
    assert list(wrong_stages(candidate, image, direct=True)) == ["embed_cost_volume"]  # type: ignore[arg-type]


def test_a_stage_that_runs_in_torch_is_not_checked() -> None:
    plan, image = make_terms(attention_type="full")
    candidate = Planted(random_plan(plan), "decode", beyond_64_classes)
    candidate.fallbacks = {"class_attention": "softmax", "decode": "it does not compile"}
    assert wrong_stages(candidate, image, direct=True) == {}  # type: ignore[arg-type]


def test_the_truth_is_not_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, image = make_terms()
    seen: list[bool] = []
    decode = torch_stages.decode

    def noted(*arguments: Any) -> Tensor:
        seen.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        return decode(*arguments)

    monkeypatch.setattr(torch_stages, "decode", noted)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    wrong_stages(Planted(random_plan(plan)), image, direct=True)  # type: ignore[arg-type]
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32


def test_a_random_plan_hides_no_weight() -> None:
    """With weights of zero, which untrained models may have, any kernel would pass."""
    plan, _ = make_terms()
    zero = dataclasses.replace(plan, head=torch.zeros_like(plan.head))
    drawn = random_plan(zero)
    assert drawn.head.abs().min() > 0
    assert drawn.head.shape == plan.head.shape
    assert drawn.layers[0].blocks[1].shift == plan.layers[0].blocks[1].shift


def test_the_kernels_pass_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """More classes take too long in the interpreter."""
    monkeypatch.setattr(self_check, "CHUNK", 2)
    monkeypatch.setattr(self_check, "CLASSES", 3)
    plan, image = make_terms(1, prompt_channel=1, pooling_size=(4, 8))
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda *arguments: decode(*arguments) + 1e-2)
    candidate = TritonStages(random_plan(plan))
    assert list(wrong_stages(candidate, image, direct=True)) == ["decode"]
    assert candidate.fallbacks == {}
