"""The engine's stages as Triton kernels; a stage that no kernel fits falls back to its torch counterpart."""

from __future__ import annotations

from torch import Tensor

from catseg_fast import stages
from catseg_fast.class_memory import ClassMemory
from catseg_fast.kernels import class_attention, cost_volume, decoder, window_attention
from catseg_fast.kernels.checks import DTYPES
from catseg_fast.plan import ClassLayer, Plan, WindowBlock
from catseg_fast.terms import BlockGuidance


class TritonStages:
    """Functions of `catseg_fast.stages`, by kernels where they fit.

    Args:
        plan: the weights that the stages will be called with.
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Attributes:
        fallbacks: by stage, why it runs in torch.
    """

    def __init__(self, plan: Plan, input_precision: str = "ieee") -> None:
        self.input_precision = input_precision
        untyped = None if plan.embed.dtype in DTYPES else f"no kernel computes in {plan.embed.dtype}"
        blocks = [window_attention.unsupported(block) for layer in plan.layers for block in layer.blocks]
        classes = [class_attention.unsupported(layer.classes) for layer in plan.layers]
        reasons = {
            "embed_cost_volume": [untyped],
            "window_block": [untyped, *blocks],
            "class_attention": [untyped, *classes],
            "decode": [untyped],
        }
        self.fallbacks = {stage: next(filter(None, why)) for stage, why in reasons.items() if any(why)}

    def embed_cost_volume(
        self, plan: Plan, image: Tensor, text: Tensor, resolution: tuple[int, int]
    ) -> Tensor:
        if "embed_cost_volume" in self.fallbacks:
            return stages.embed_cost_volume(plan, image, text, resolution)
        return cost_volume.embed_cost_volume(plan, image, text, resolution, self.input_precision)

    def window_block(self, block: WindowBlock, guidance: BlockGuidance, x: Tensor) -> Tensor:
        if "window_block" in self.fallbacks:
            return stages.window_block(block, guidance, x)
        return window_attention.window_block(block, guidance, x, self.input_precision)

    def class_collect(
        self,
        layer: ClassLayer,
        memory: ClassMemory,
        x: Tensor,
        text_key: Tensor | None,
        resolution: tuple[int, int],
    ) -> None:
        if "class_attention" in self.fallbacks:
            stages.class_collect(layer, memory, x, text_key, resolution)
        else:
            class_attention.class_collect(
                layer, memory, x, text_key, resolution, input_precision=self.input_precision
            )

    def class_apply(
        self,
        layer: ClassLayer,
        x: Tensor,
        text_query: Tensor | None,
        memory: ClassMemory,
        resolution: tuple[int, int],
    ) -> Tensor:
        if "class_attention" in self.fallbacks:
            return stages.class_apply(layer, x, text_query, memory, resolution)
        return class_attention.class_apply(
            layer, x, text_query, memory, resolution, input_precision=self.input_precision
        )

    def decode(
        self, plan: Plan, guidance: tuple[Tensor, Tensor], x: Tensor, resolution: tuple[int, int]
    ) -> Tensor:
        if "decode" in self.fallbacks:
            return stages.decode(plan, guidance, x, resolution)
        return decoder.decode(plan, guidance, x, resolution, self.input_precision)
