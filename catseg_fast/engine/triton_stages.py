"""The engine's stages on Triton kernels; a stage without a suitable kernel runs in torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from catseg_fast.engine import arguments
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.arguments import Decoding
from catseg_fast.engine.class_memory import ClassMemory, LinearMemory
from catseg_fast.engine.folding import ClassLayer, Plan, WindowBlock
from catseg_fast.engine.launches.prepared_calls import PreparedCalls
from catseg_fast.engine.terms import BlockGuidance
from catseg_fast.errors import InputError, RunError
from catseg_fast.kernels.class_attention import checks as class_checks
from catseg_fast.kernels.class_attention import op as class_attention
from catseg_fast.kernels.cost_volume import op as cost_volume
from catseg_fast.kernels.decoder import op as decoder
from catseg_fast.kernels.launch.checks import DTYPES, INTERPRETED
from catseg_fast.kernels.launch.launcher import listing, recording
from catseg_fast.kernels.window_attention import op as window_attention

Resolution = tuple[int, int]


class TritonStages:
    """The functions of `catseg_fast.engine.torch_stages`, on kernels where possible.

    If a kernel does not compile or its results are wrong, its stage runs in torch from then on, with a
    warning. With the environment variable CATSEG_FAST_STRICT set to 1, that is an error.

    Args:
        plan: the weights of the stages, which are laid out for the kernels once, here.
        input_precision: precision of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Attributes:
        fallbacks: reasons of the stages that run in torch, by stage.
        ready: kinds of calls whose kernels are compiled and checked (`first_call.py`).
    """

    def __init__(self, plan: Plan, input_precision: str = "ieee") -> None:
        self.plan, self.input_precision = plan, input_precision
        untyped = None if plan.embed.dtype in DTYPES else f"no kernel computes in {plan.embed.dtype}"
        if INTERPRETED and plan.embed.dtype == torch.bfloat16:
            untyped = "Triton's interpreter gives wrong results in bfloat16"
        blocks = [unsupported_block(block) for layer in plan.layers for block in layer.blocks]
        classes = [unsupported_classes(layer.classes) for layer in plan.layers]
        reasons = {
            "embed_cost_volume": [untyped],
            "window_block": [untyped, *blocks],
            "class_attention": [untyped, *classes],
            "decode": [untyped],
        }
        self.fallbacks = {stage: next(filter(None, why)) for stage, why in reasons.items() if any(why)}
        self._embedding, self._decoding = kernel_embedding(plan), kernel_decoding(plan)
        self._calls = None if INTERPRETED else PreparedCalls()
        self.ready: set[object] = set()

    @property
    def collects_at_once(self) -> bool:
        """True if `class_collect` is best called once with all classes, where they are resident."""
        return "class_attention" not in self.fallbacks

    @property
    def repeats(self) -> bool:
        """True if launches are prepared now."""
        if self._calls is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        return not listing()

    def as_one(self, key: object, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Return `run(*inputs)`, which calls several stages; if possible, launches are prepared as one."""
        if self._calls is None or recording():
            return run(*inputs)
        out: Tensor = self._calls(key, run, *inputs)
        return out

    def embed_cost_volume(self, plan: Plan, image: Tensor, text: Tensor, resolution: Resolution) -> Tensor:
        def launch(image: Tensor, text: Tensor) -> Tensor:
            return cost_volume.embed_cost_volume(
                image, text, *self._embedding, resolution, self.input_precision
            )

        def kernel() -> Tensor:
            return self._repeat(("embed", resolution), launch, image, text)

        return self._run("embed_cost_volume", kernel, stages.embed_cost_volume, plan, image, text, resolution)

    def window_block(
        self, block: WindowBlock, guidance: BlockGuidance, x: Tensor, out: Tensor | None = None
    ) -> Tensor:
        def launch(x: Tensor, query_key: Tensor, out: Tensor | None) -> Tensor:
            own = replace(guidance, query_key=query_key)
            return window_block(block, own, x, out, self.input_precision)

        def kernel() -> Tensor:
            # The block is a part of the plan, and lives as long as these stages.
            key = ("window", id(block), guidance.resolution, guidance.window, guidance.shift)
            return self._repeat(key, launch, x, guidance.query_key, out)

        return self._run("window_block", kernel, stages.window_block, block, guidance, x, out)

    def class_collect(
        self,
        layer: ClassLayer,
        memory: ClassMemory,
        x: Tensor,
        text_key: Tensor | None,
        resolution: Resolution,
        last: bool = False,
    ) -> None:
        def kernel() -> None:
            class_collect(layer, memory, x, text_key, resolution, last, self.input_precision, self._repeat)

        arguments = (layer, memory, x, text_key, resolution, last)
        self._run("class_attention", kernel, stages.class_collect, *arguments)

    def class_apply(
        self,
        layer: ClassLayer,
        x: Tensor,
        text_query: Tensor | None,
        memory: ClassMemory,
        resolution: Resolution,
    ) -> Tensor:
        def kernel() -> Tensor:
            return class_apply(layer, x, text_query, memory, resolution, self.input_precision, self._repeat)

        return self._run(
            "class_attention", kernel, stages.class_apply, layer, x, text_query, memory, resolution
        )

    def decode(
        self,
        plan: Plan,
        guidance: tuple[Tensor, Tensor],
        x: Tensor,
        resolution: Resolution,
        out: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> Tensor:
        def launch(x: Tensor, out: Tensor | None, flag: Tensor | None, *maps: Tensor) -> Tensor:
            return decoder.decode(x, maps, *self._decoding, resolution, self.input_precision, out, flag)

        def kernel() -> Tensor:
            maps = (arguments.channels_last(added) for added in guidance)
            return self._repeat(("decode", resolution), launch, x, out, flag, *maps)

        return self._run("decode", kernel, stages.decode, plan, guidance, x, resolution, out, flag)

    def _repeat(self, key: object, launch: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """Return `launch(*inputs)`, whose launches are prepared and repeated if possible."""
        if not self.repeats or recording():  # of several stages that are prepared as one
            return launch(*inputs)
        assert self._calls is not None
        return self._calls(key, launch, *inputs)

    def _run(
        self, stage: str, kernel: Callable[[], Any], fallback: Callable[..., Any], *arguments: Any
    ) -> Any:
        if stage not in self.fallbacks:
            try:
                return kernel()
            except Exception as error:
                if not _does_not_compile(error):
                    raise
                self.fall_back(stage, str(error).strip().splitlines()[-1], error)
        return fallback(*arguments)

    def fall_back(self, stage: str, reason: str, error: Exception | None = None) -> None:
        """Run a stage in torch from now on, with a warning.

        Raises:
            RunError: if CATSEG_FAST_STRICT is 1.
        """
        if os.environ.get("CATSEG_FAST_STRICT") == "1":
            raise RunError(f"{stage}: the Triton kernel fails: {reason}") from error
        self.fallbacks[stage] = reason
        warnings.warn(
            f"{stage} runs in torch, because the Triton kernel fails: {reason}", RuntimeWarning, stacklevel=2
        )


def kernel_embedding(plan: Plan) -> tuple[Tensor, Tensor]:
    """Return the weights of `embed_cost_volume` in the kernels' layout."""
    weight, bias = arguments.embedding(plan)
    return weight.contiguous(), bias


def kernel_decoding(plan: Plan) -> Decoding:
    """Return weights, groups and eps of `decode` in the kernels' layout."""
    weights, groups, eps = arguments.decoding(plan)
    return decoder.pack_weights(weights), groups, eps


def window_block(
    block: WindowBlock,
    guidance: BlockGuidance,
    x: Tensor,
    out: Tensor | None = None,
    input_precision: str = "ieee",
) -> Tensor:
    """Run `torch_stages.window_block` on kernels."""
    return window_attention.window_block(
        x, guidance.query_key, *arguments.window_weights(block),
        guidance.resolution, guidance.window, guidance.shift, block.heads, input_precision, out,
    )  # fmt: skip


def call_directly(key: object, launch: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """Return `launch(*inputs)`; has the interface of `PreparedCalls`."""
    return launch(*inputs)


def class_collect(
    layer: ClassLayer,
    memory: ClassMemory,
    x: Tensor,
    text_key: Tensor | None,
    resolution: Resolution,
    last: bool = False,
    input_precision: str = "ieee",
    call: Callable[..., Any] = call_directly,
) -> None:
    """Run `torch_stages.class_collect` on kernels; the memory's sums become new tensors."""
    memory = _linear(layer, memory)
    heads, length, pooling = memory.heads, memory.length, layer.pooling or (1, 1)

    def launch(
        x: Tensor, text_key: Tensor | None, key_value: Tensor | None, key_sum: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return class_attention.class_collect(
            x, layer.kv, layer.kv_bias, text_key, key_value, key_sum, heads, length, resolution, pooling,
            last, input_precision,
        )  # fmt: skip

    key_value = memory.key_value if isinstance(memory.key_value, Tensor) else None
    key_sum = memory.key_sum if isinstance(memory.key_sum, Tensor) else None
    # The layer is a part of the plan, and lives as long as its prepared launches.
    key = ("collect", id(layer), heads, length, resolution, last)
    result, memory.key_sum = call(key, launch, x, text_key, key_value, key_sum)
    if last:
        memory.key_value, memory.means = 0.0, result
    else:
        memory.key_value = result


def class_apply(
    layer: ClassLayer,
    x: Tensor,
    text_query: Tensor | None,
    memory: ClassMemory,
    resolution: Resolution,
    input_precision: str = "ieee",
    call: Callable[..., Any] = call_directly,
) -> Tensor:
    """Run `torch_stages.class_apply` on kernels."""
    memory = _linear(layer, memory)
    settings = (memory.heads, memory.length, memory.eps, resolution, layer.pooling or (1, 1), input_precision)

    def launch(x: Tensor, text_query: Tensor | None, means: Tensor, key_sum: Tensor) -> Tensor:
        return class_attention.class_apply(
            x, text_query, means, key_sum, *arguments.apply_weights(layer), *settings
        )

    out: Tensor = call(("apply", id(layer), *settings), launch, x, text_query, *memory.closed())
    return out


def unsupported_block(block: WindowBlock) -> str | None:
    """Return why the kernels cannot run a block; None if they can."""
    return window_attention.unsupported(len(block.proj), block.heads, block.window)


def unsupported_classes(layer: ClassLayer) -> str | None:
    """Return why the kernels cannot run a class-attention layer; None if they can."""
    if not layer.linear:
        return "softmax attention over classes has no kernel"
    return class_checks.unsupported(len(layer.q), layer.heads)


def _linear(layer: ClassLayer, memory: ClassMemory) -> LinearMemory:
    if reason := unsupported_classes(layer):
        raise InputError(f"layer: {reason}")
    if not isinstance(memory, LinearMemory):
        raise InputError(f"memory: {type(memory).__name__} has no kernel; expected LinearMemory")
    return memory


def _does_not_compile(error: Exception) -> bool:
    """Check whether Triton cannot compile a kernel; a failed compiler pass raises a plain RuntimeError."""
    if isinstance(error, triton.InterpreterError):
        return False
    return isinstance(error, triton.TritonError) or "PassManager::run failed" in str(error)
