"""The engine's stages as Triton kernels; a stage that no kernel fits falls back to its torch counterpart."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.class_memory import ClassMemory
from catseg_fast.engine.folding import ClassLayer, Plan, WindowBlock
from catseg_fast.engine.self_check import wrong_stages
from catseg_fast.engine.terms import BlockGuidance, ImageTerms
from catseg_fast.errors import RunError
from catseg_fast.kernels.class_attention import op as class_attention
from catseg_fast.kernels.cost_volume import op as cost_volume
from catseg_fast.kernels.decoder import op as decoder
from catseg_fast.kernels.launch.checks import DTYPES, INTERPRETED
from catseg_fast.kernels.window_attention import op as window_attention


class TritonStages:
    """Functions of `catseg_fast.engine.torch_stages`, by kernels where they fit.

    With the environment variable CATSEG_FAST_STRICT set to 1, a kernel that does not compile or computes
    something wrong is an error; else its stage runs in torch from then on, with a warning.

    Args:
        plan: the weights that the stages will be called with.
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Attributes:
        fallbacks: by stage, why it runs in torch.
    """

    def __init__(self, plan: Plan, input_precision: str = "ieee") -> None:
        self.plan, self.input_precision = plan, input_precision
        untyped = None if plan.embed.dtype in DTYPES else f"no kernel computes in {plan.embed.dtype}"
        if INTERPRETED and plan.embed.dtype == torch.bfloat16:
            untyped = "Triton's interpreter computes wrongly in bfloat16"
        blocks = [window_attention.unsupported(block) for layer in plan.layers for block in layer.blocks]
        classes = [class_attention.unsupported(layer.classes) for layer in plan.layers]
        reasons = {
            "embed_cost_volume": [untyped],
            "window_block": [untyped, *blocks],
            "class_attention": [untyped, *classes],
            "decode": [untyped],
        }
        self.fallbacks = {stage: next(filter(None, why)) for stage, why in reasons.items() if any(why)}
        self._checked = False

    def check(self, image: ImageTerms) -> None:
        """Compare each kernel with torch on this GPU, once; stages that differ run in torch from then on.

        Nothing is done in the interpreter, which is slow and proves nothing about a GPU.
        """
        if self._checked or not image.features.is_cuda:
            return
        self._checked = True
        for stage, reason in wrong_stages(self, self.plan, image).items():
            self._fall_back(stage, f"computes something else than torch on this GPU: {reason}")

    def embed_cost_volume(
        self, plan: Plan, image: Tensor, text: Tensor, resolution: tuple[int, int]
    ) -> Tensor:
        arguments = (plan, image, text, resolution)
        return self._run(
            "embed_cost_volume", cost_volume.embed_cost_volume, stages.embed_cost_volume, *arguments
        )

    def window_block(self, block: WindowBlock, guidance: BlockGuidance, x: Tensor) -> Tensor:
        arguments = (block, guidance, x)
        return self._run("window_block", window_attention.window_block, stages.window_block, *arguments)

    def class_collect(
        self,
        layer: ClassLayer,
        memory: ClassMemory,
        x: Tensor,
        text_key: Tensor | None,
        resolution: tuple[int, int],
    ) -> None:
        arguments = (layer, memory, x, text_key, resolution)
        self._run("class_attention", class_attention.class_collect, stages.class_collect, *arguments)

    def class_apply(
        self,
        layer: ClassLayer,
        x: Tensor,
        text_query: Tensor | None,
        memory: ClassMemory,
        resolution: tuple[int, int],
    ) -> Tensor:
        arguments = (layer, x, text_query, memory, resolution)
        return self._run("class_attention", class_attention.class_apply, stages.class_apply, *arguments)

    def decode(
        self, plan: Plan, guidance: tuple[Tensor, Tensor], x: Tensor, resolution: tuple[int, int]
    ) -> Tensor:
        return self._run("decode", decoder.decode, stages.decode, plan, guidance, x, resolution)

    def _run(self, stage: str, kernel: Callable[..., Any], fallback: Callable[..., Any], *args: Any) -> Any:
        if stage not in self.fallbacks:
            try:
                return kernel(*args, input_precision=self.input_precision)
            except Exception as error:
                if not _does_not_compile(error):
                    raise
                self._fall_back(stage, str(error).strip().splitlines()[-1], error)
        return fallback(*args)

    def _fall_back(self, stage: str, reason: str, error: Exception | None = None) -> None:
        if os.environ.get("CATSEG_FAST_STRICT") == "1":
            raise RunError(f"{stage}: the Triton kernel fails: {reason}") from error
        self.fallbacks[stage] = reason
        warnings.warn(
            f"{stage} runs in torch, because the Triton kernel fails: {reason}", RuntimeWarning, stacklevel=2
        )


def _does_not_compile(error: Exception) -> bool:
    """Whether Triton refuses a kernel; a pass of its compiler that fails is a plain RuntimeError."""
    if isinstance(error, triton.InterpreterError):
        return False
    return isinstance(error, triton.TritonError) or "PassManager::run failed" in str(error)
