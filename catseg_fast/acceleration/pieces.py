"""Window blocks, class layers and decoders in the engine, inside aggregators that are not upstream's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catseg_fast.acceleration.piece import Piece, by_chunks, one_part
from catseg_fast.acceleration.reading import check_hooks, read_class_layer, read_decoder, read_window_pair
from catseg_fast.acceleration.trial import CROPS, Factors, Random, Resolution, by_crop
from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.folding import Plan, wide
from catseg_fast.engine.stages import Stages
from catseg_fast.engine.terms import block_guidance, decoder_guidance_maps
from catseg_fast.errors import InputError


class WindowBlocks(Piece):
    """Two window blocks under one guidance (`SwinTransformerBlockWrapper`)."""

    kind = "window blocks"
    arguments = ("x", "appearance_guidance")

    def read_twin(self, module: nn.Module) -> nn.Module:
        check_hooks(module)
        return one_part(windows=read_window_pair(module, ""))

    def compute(self, plan: Plan, stages: Stages, x: Tensor, guidance: Tensor | None) -> Tensor:
        (layer,), resolution = plan.layers, (x.shape[3], x.shape[4])
        tokens = None
        if guidance is not None:
            tokens = wide(guidance.flatten(2).transpose(1, 2))
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=layer.guidance_eps).to(plan.embed.dtype)
        elif layer.blocks[0].guidance is not None:
            raise InputError("appearance_guidance: none, where the weights have some")
        first, second = (
            (block, block_guidance(block, tokens, resolution, x.device)) for block in layer.blocks
        )

        def step(chunk: Tensor, classes: slice) -> Tensor:
            return stages.window_block(*second, stages.window_block(*first, chunk, None), None)

        return by_chunks(plan, x, step)

    def make_inputs(
        self, module: Any, size: Resolution | None, random: Random, classes: int, factors: Factors
    ) -> tuple[Any, ...]:
        block, resolution = module.block_1, size or tuple(module.block_1.input_resolution)
        width = block.attn.q.in_features - block.attn.v.in_features
        x = random.normal(CROPS, block.attn.v.in_features, classes, *resolution)
        return by_crop(x, factors), random.normal(CROPS, width, *resolution) if width else None


class ClassAttention(Piece):
    """Attention over the classes (`ClassTransformerLayer`)."""

    kind = "class layer"

    def read_twin(self, module: nn.Module) -> nn.Module:
        check_hooks(module)
        return one_part(classes=read_class_layer(module, ""))

    def compute(self, plan: Plan, stages: Stages, x: Tensor, guidance: Tensor | None) -> Tensor:
        layer, resolution, total = plan.layers[0].classes, (x.shape[3], x.shape[4]), x.shape[2]
        queries = keys = None
        if layer.text is not None:
            if guidance is None:
                raise InputError("guidance: none, where the weights have some")
            queries, keys = F.linear(guidance.to(plan.embed.dtype), layer.text).chunk(2, dim=-1)
        memory = new_memory(layer, total)

        def collect(chunk: Tensor, classes: slice) -> None:
            key = None if keys is None else keys[:, classes]
            stages.class_collect(layer, memory, chunk, key, resolution, classes.stop == total)

        def apply(chunk: Tensor, classes: slice) -> Tensor:
            query = None if queries is None else queries[:, classes]
            return stages.class_apply(layer, chunk, query, memory, resolution)

        state = by_chunks(plan, x, collect)
        memory.close(plan.embed.dtype)
        return by_chunks(plan, state, apply)

    def make_inputs(
        self, module: Any, size: Resolution | None, random: Random, classes: int, factors: Factors
    ) -> tuple[Any, ...]:
        layer, pool = module.attention, getattr(module.pool, "kernel_size", 1)
        sides = (pool, pool) if isinstance(pool, int) else pool
        channels, width = layer.v.in_features, layer.q.in_features - layer.v.in_features
        x = random.normal(CROPS, channels, classes, 2 * sides[0], 3 * sides[1])
        return by_crop(x, factors), random.normal(CROPS, classes, width) if width else None


class Decoder(Piece):
    """Guided upsampling (`conv_decoder` of an aggregator, with `decoder1`, `decoder2` and `head`)."""

    kind = "decoder"
    method = "conv_decoder"

    def watched(self) -> dict[str, nn.Module]:
        watched = {"": self.module}
        for name in ("decoder1", "decoder2", "head"):
            for inner, module in getattr(self.module, name).named_modules():
                watched[".".join(filter(None, (name, inner)))] = module
        return watched

    def copied(self) -> nn.Module:
        bare = copy.copy(self.module)
        bare._modules = {name: getattr(self.module, name) for name in ("decoder1", "decoder2", "head")}
        return bare

    def read_twin(self, module: nn.Module) -> nn.Module:
        for name in ("decoder1", "decoder2", "head"):
            holder = nn.Module()
            setattr(holder, name, getattr(module, name))
            check_hooks(holder)
        return one_part(decoder=read_decoder(module))

    def compute(self, plan: Plan, stages: Stages, x: Tensor, guidance: Sequence[Tensor | None]) -> Tensor:
        H, W = resolution = (x.shape[3], x.shape[4])
        first, second = (
            decoder_guidance_maps(stage, maps, (k * H, k * W))
            for stage, maps, k in zip(plan.decoder, guidance, (2, 4), strict=True)
        )

        def step(chunk: Tensor, classes: slice) -> Tensor:
            return stages.decode(plan, (first, second), chunk, resolution, None, None)

        return by_chunks(plan, x, step)

    def make_inputs(
        self, module: Any, size: Resolution | None, random: Random, classes: int, factors: Factors
    ) -> tuple[Any, ...]:
        widths = [
            up.conv.double_conv[0].in_channels - up.up.out_channels
            for up in (module.decoder1, module.decoder2)
        ]
        x = random.normal(CROPS, module.decoder1.up.in_channels, classes, 3, 4)
        return by_crop(x, factors), [
            random.normal(CROPS, width, 3 * k, 4 * k) if width else None
            for width, k in zip(widths, (2, 4), strict=True)
        ]


def find_pieces(model: nn.Module) -> Iterator[tuple[str, type[Piece], nn.Module]]:
    """Modules that are built like a part of upstream's aggregator, by name."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
            continue
        if all(hasattr(module, child) for child in ("block_1", "block_2", "guidance_norm")):
            yield name, WindowBlocks, module
        if all(hasattr(module, child) for child in ("attention", "MLP", "pool", "norm1", "norm2")):
            yield name, ClassAttention, module
        if all(hasattr(module, child) for child in ("decoder1", "decoder2", "head", "conv_decoder")):
            yield name, Decoder, module
