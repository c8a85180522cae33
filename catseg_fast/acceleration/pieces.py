"""Window blocks, class layers and decoders in the engine, inside aggregators that are not upstream's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catseg_fast import reference
from catseg_fast.acceleration import trial
from catseg_fast.acceleration.comparing import differs, differs_in_16_bits
from catseg_fast.acceleration.part import Inputs, Part
from catseg_fast.acceleration.reading import check_hooks, read_class_layer, read_decoder, read_window_pair
from catseg_fast.acceleration.trial import CROPS, Random, Resolution
from catseg_fast.acceleration.whole import in_full_precision
from catseg_fast.backend import choose_backend
from catseg_fast.engine import torch_stages
from catseg_fast.engine.class_memory import new_memory
from catseg_fast.engine.folding import Plan, build_plan, wide
from catseg_fast.engine.precision import compute_dtype
from catseg_fast.engine.schedule import usual_chunk
from catseg_fast.engine.stages import Stages
from catseg_fast.engine.terms import block_guidance, decoder_guidance_maps
from catseg_fast.errors import InputError


class Piece(Part):
    """A part of an aggregator whose input is the state of all classes, `[B, C, T, H, W]`."""

    arguments: tuple[str, str] = ("x", "guidance")

    def __init__(self, module: nn.Module, name: str, verify: bool = True, backend: str = "auto") -> None:
        super().__init__(module, name, verify)
        self.backend = backend
        self._twin: nn.Module | None = None
        self._plans: dict[torch.dtype, tuple[Plan, Stages]] = {}

    def read(self) -> None:
        self._twin = self.read_twin(self.module)
        self._plans.clear()

    def read_twin(self, module: nn.Module) -> nn.Module:
        """Return an aggregator in which this part is read from a module, and others are idle."""
        raise NotImplementedError

    def compute(self, plan: Plan, stages: Stages, x: Tensor, guidance: Any) -> Tensor:
        """Return the engine's answer for a state, in the type of the plan."""
        raise NotImplementedError

    def make_inputs(
        self, module: Any, size: Resolution | None, random: Random, classes: int, scale: float
    ) -> tuple[Any, ...]:
        """Return random arguments of the module's method."""
        raise NotImplementedError

    def check_code(self) -> None:
        def prepare(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
            return functools.partial(self.compute, build_plan(self.read_twin(module), dtype), torch_stages)

        trial.check_code(self.copied(), self.make_inputs, prepare, self.method)

    def copied(self) -> nn.Module:
        """Return what is copied for a trial."""
        return self.module

    def settings(self) -> object:
        return self.backend

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Inputs | None:
        if len(args) + len(kwargs) != 2 or not args:
            return None
        x = args[0]
        guidance = args[1] if len(args) == 2 else next(iter(kwargs.values()))
        if kwargs and next(iter(kwargs)) not in self.arguments:
            return None
        return (x, guidance) if isinstance(x, Tensor) and x.ndim == 5 and x.numel() else None

    def run(self, inputs: Inputs) -> Tensor:
        x, guidance = inputs
        plan, stages = self._prepared()
        with torch.autocast(x.device.type, enabled=False):
            return self.compute(plan, stages, x, guidance)

    def compare(self, args: Sequence[Any], kwargs: dict[str, Any], inputs: Inputs) -> tuple[Any, str | None]:
        own = self.own(args, kwargs)
        try:
            ours = self.run(inputs)
        except Exception as error:  # the engine must never be the reason why a model does not run
            return own, f"the engine fails: {type(error).__name__}: {error}"
        if self._prepared()[0].embed.itemsize >= 4 and own.itemsize >= 4:
            return own, differs(ours, own)
        truth = in_full_precision(self.module, args, kwargs, self.method)
        return own, differs_in_16_bits(ours, own, truth)

    def _prepared(self) -> tuple[Plan, Stages]:
        assert self._twin is not None
        weight = self._twin.get_parameter("conv1.weight")
        dtype = compute_dtype(None, weight)
        if weight.dtype == torch.float32 and not torch.is_autocast_enabled(weight.device.type):
            dtype = torch.float32  # on a GPU, too: what surrounds the part computes in fp32
        if dtype not in self._plans:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(weight.device.type, enabled=False),
            ):
                plan = build_plan(self._twin, dtype)
            stages: Any = torch_stages
            chosen = choose_backend(self.backend, weight.device)
            if chosen == "triton" and (dtype.itemsize == 2 or self.backend == "triton"):
                from catseg_fast.engine.triton_stages import TritonStages  # triton exists for Linux only

                stages = TritonStages(plan)
            self._plans[dtype] = (plan, stages)
        return self._plans[dtype]


class WindowBlocks(Piece):
    """Two window blocks under one guidance (`SwinTransformerBlockWrapper`)."""

    kind = "window blocks"
    arguments = ("x", "appearance_guidance")

    def read_twin(self, module: nn.Module) -> nn.Module:
        check_hooks(module)
        return _aggregator(windows=read_window_pair(module, ""))

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

        return _by_chunks(plan, x, step)

    def make_inputs(
        self, module: Any, size: Resolution | None, random: Random, classes: int, scale: float
    ) -> tuple[Any, ...]:
        block, resolution = module.block_1, size or tuple(module.block_1.input_resolution)
        width = block.attn.q.in_features - block.attn.v.in_features
        x = random.normal(CROPS, block.attn.v.in_features, classes, *resolution)
        return x * scale, random.normal(CROPS, width, *resolution) if width else None


class ClassAttention(Piece):
    """Attention over the classes (`ClassTransformerLayer`)."""

    kind = "class layer"

    def read_twin(self, module: nn.Module) -> nn.Module:
        check_hooks(module)
        return _aggregator(classes=read_class_layer(module, ""))

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

        state = _by_chunks(plan, x, collect)
        memory.close(plan.embed.dtype)
        return _by_chunks(plan, state, apply)

    def make_inputs(
        self, module: Any, size: Resolution | None, random: Random, classes: int, scale: float
    ) -> tuple[Any, ...]:
        layer, pool = module.attention, getattr(module.pool, "kernel_size", 1)
        sides = (pool, pool) if isinstance(pool, int) else pool
        channels, width = layer.v.in_features, layer.q.in_features - layer.v.in_features
        x = random.normal(CROPS, channels, classes, 2 * sides[0], 3 * sides[1])
        return x * scale, random.normal(CROPS, classes, width) if width else None


class Decoder(Piece):
    """Guided upsampling (`conv_decoder` of an aggregator, with `decoder1`, `decoder2` and `head`)."""

    kind = "decoder"
    method = "conv_decoder"

    def watched(self) -> dict[str, nn.Module]:
        names = ("decoder1", "decoder2", "head")
        return {
            ".".join(filter(None, (name, inner))): module
            for name in names
            for inner, module in getattr(self.module, name).named_modules()
        }

    def copied(self) -> nn.Module:
        bare = copy.copy(self.module)
        bare._modules = {name: getattr(self.module, name) for name in ("decoder1", "decoder2", "head")}
        return bare

    def read_twin(self, module: nn.Module) -> nn.Module:
        for name in ("decoder1", "decoder2", "head"):
            holder = nn.Module()
            setattr(holder, name, getattr(module, name))
            check_hooks(holder)
        return _aggregator(decoder=read_decoder(module))

    def compute(self, plan: Plan, stages: Stages, x: Tensor, guidance: Sequence[Tensor | None]) -> Tensor:
        H, W = resolution = (x.shape[3], x.shape[4])
        first, second = (
            decoder_guidance_maps(stage, maps, (k * H, k * W))
            for stage, maps, k in zip(plan.decoder, guidance, (2, 4), strict=True)
        )

        def step(chunk: Tensor, classes: slice) -> Tensor:
            return stages.decode(plan, (first, second), chunk, resolution, None, None)

        return _by_chunks(plan, x, step)

    def make_inputs(
        self, module: Any, size: Resolution | None, random: Random, classes: int, scale: float
    ) -> tuple[Any, ...]:
        widths = [
            up.conv.double_conv[0].in_channels - up.up.out_channels
            for up in (module.decoder1, module.decoder2)
        ]
        x = random.normal(CROPS, module.decoder1.up.in_channels, classes, 3, 4)
        return x * scale, [
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


def _by_chunks(plan: Plan, x: Tensor, step: Callable[[Tensor, slice], Tensor | None]) -> Tensor:
    """Run a step on chunks of a state's classes.

    Returns:
        The results: states `[B, C, T, H, W]`, or logits `[B, T, H, W]`; the state itself if there are none.
    """
    B, C, T, H, W = x.shape
    state = x.permute(0, 2, 3, 4, 1).reshape(B, T, H * W, C).to(plan.embed.dtype)
    count, parts = usual_chunk(T, B, x.device), []
    for start in range(0, T, count):
        classes = slice(start, min(start + count, T))
        part = step(state[:, classes], classes)
        if part is not None:
            parts.append(part)
    if not parts:
        return state.view(B, T, H, W, C).permute(0, 4, 1, 2, 3)
    result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if result.shape[2:] != (H * W, C):
        return result
    return result.view(B, T, H, W, C).permute(0, 4, 1, 2, 3)


def _aggregator(windows: Any = None, classes: Any = None, decoder: Any = None) -> nn.Module:
    """An aggregator of one part; the others, which are not run, are as small as can be."""
    part = windows if windows is not None else classes if classes is not None else decoder[0]
    weight = next(part.parameters())
    options = {"device": weight.device, "dtype": weight.dtype}
    with torch.device(weight.device):
        twin: Any = nn.Module()
        if decoder is None:
            channels = windows.block_1.dim if windows is not None else classes.attention.v.in_features
            pair: Any = nn.Module()
            pair.swin_block = windows
            pair.attention = classes
            if windows is None:
                heads = classes.attention.nheads
                pair.swin_block = reference.SwinTransformerBlockWrapper(channels, 0, (2, 2), heads, 2)
            if classes is None:
                pair.attention = reference.ClassTransformerLayer(channels, 0, 1, pooling_size=None, pad_len=0)
            twin.layers = nn.ModuleList([pair])
            decoder = (reference.Up(channels, 16, 0), reference.Up(16, 16, 0), nn.Conv2d(16, 1, 3, padding=1))
        else:
            channels = decoder[0].up.in_channels
            twin.layers = nn.ModuleList()
        twin.decoder1, twin.decoder2, twin.head = decoder
        twin.conv1 = nn.Conv2d(1, channels, 7, padding=3).to(**options)
    return twin
