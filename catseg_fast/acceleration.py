"""Put the engine into a model that was built elsewhere, such as with upstream's own code."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from catseg_fast import reference
from catseg_fast.aggregator import Aggregator
from catseg_fast.backend import check_backend, choose_backend
from catseg_fast.engine.engine import Engine
from catseg_fast.errors import InputError
from catseg_fast.reference.aggregator import check_shapes

# What an aggregator is told by.
_PARTS = (
    "layers",
    "conv1",
    "decoder1",
    "decoder2",
    "head",
    "guidance_projection",
    "text_guidance_projection",
)


class Acceleration:
    """Aggregators that run in the engine, until `restore` (or the end of a `with` block).

    Attributes:
        engines: by the aggregator's name in the model; they have the settings for memory and precision.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.engines = engines

    def restore(self) -> None:
        """Give the aggregators their own code back; a second call does nothing."""
        for engine in self.engines.values():
            engine.aggregator.__dict__.pop("forward", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def accelerate(
    model: nn.Module,
    *,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    verify: bool = True,
) -> Acceleration:
    """Let the aggregators in a model run in the engine; they keep their parameters and their arguments.

    Aggregators are found by their structure. Calls in training mode, or that need gradients, run in the
    model's own code.

    Args:
        model: an aggregator built like upstream's, or any model that holds one.
        backend: "auto", "triton" or "torch".
        memory_budget: bytes (or "2GiB") that a call may take; by default what is free.
        verify: compare the engine's answer with the model's own on a small random input.

    Raises:
        InputError: if there is no aggregator, or one computes something else or has an engine already; the
            message says what. The model is then as before.
        RunError: if the back end cannot run.
    """
    if check_backend(backend) == "reference":
        raise InputError("backend: 'reference' is no engine; the model has its own code")
    engines = {}
    for name, module in model.named_modules():
        if not all(hasattr(module, part) for part in _PARTS):
            continue
        if isinstance(module, Aggregator) or "forward" in vars(module):
            has = "an engine" if isinstance(module, Aggregator) else "a forward of its own"
            raise InputError(f"model: {name or 'it'} has {has} already")
        check_structure(module, name)
        engine = Engine(module)
        engine.memory_budget, engine.backend = memory_budget, backend
        choose_backend(backend, engine.aggregator.conv1.weight.device)
        if verify:
            check_answer(engine, name)
        engines[name] = engine
    if not engines:
        raise InputError(f"model: no aggregator was found in this {type(model).__name__}")
    for engine in engines.values():
        engine.aggregator.forward = _Forward(engine)
    return Acceleration(engines)


class _Forward:
    """An aggregator's new `forward`; an object, so that a copy of the model gets one of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(
        self, img_feats: Tensor, text_feats: Tensor, appearance_guidance: Sequence[Tensor | None]
    ) -> Tensor:
        aggregator = self.engine.aggregator
        if aggregator.training or torch.is_grad_enabled():
            return type(aggregator).forward(aggregator, img_feats, text_feats, appearance_guidance)
        check_shapes(aggregator, img_feats, text_feats)
        return self.engine.logits(img_feats, text_feats, appearance_guidance, max_classes(aggregator))


def max_classes(aggregator: nn.Module) -> int | None:
    """Above how many classes an aggregator drops some: its own setting, or upstream's `pad_len`."""
    if isinstance(aggregator, reference.Aggregator):
        return aggregator.max_classes
    return getattr(aggregator, "pad_len", 0) or None


def check_structure(aggregator: Any, name: str) -> None:
    """Raise a ValueError unless the parameters are those of the reference with the same sizes."""
    try:
        with torch.device("meta"):
            twin = reference.Aggregator(**_arguments(aggregator))
    except (AttributeError, IndexError, TypeError) as error:
        raise InputError(f"model: {name or 'it'} is not built like upstream's Aggregator: {error}") from error
    expected = {key: value.shape for key, value in twin.named_parameters()}
    found = {key: value.shape for key, value in aggregator.named_parameters()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise InputError(
                f"model: {name or 'it'} is not built like upstream's Aggregator: {key} is "
                f"{_shape(found.get(key))}, expected {_shape(expected.get(key))}"
            )


def check_answer(engine: Engine, name: str) -> None:
    """Raise a ValueError unless engine and aggregator agree on a small random input."""
    aggregator: Any = engine.aggregator
    arguments = _arguments(aggregator)
    weight = aggregator.conv1.weight
    H, W = arguments["feature_resolution"]
    sizes = [(arguments["appearance_guidance_dim"], 1)]
    sizes += zip(arguments["decoder_guidance_dims"], (2, 4), strict=False)
    generator = torch.Generator(weight.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)

    width = arguments["text_guidance_dim"] or 64
    img_feats, text_feats = random(1, width, H, W), random(1, 2, weight.shape[1], width)
    guidance = [random(1, channels, k * H, k * W) if channels else None for channels, k in sizes]
    modes = {module: module.training for module in aggregator.modules()}
    precision, engine.precision = engine.precision, weight.dtype
    aggregator.eval()
    try:
        with torch.no_grad():
            own = type(aggregator).forward(aggregator, img_feats, text_feats, guidance).float()
            ours = engine.logits(img_feats, text_feats, guidance, max_classes(aggregator)).float()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"model: {name or 'it'} does not run on upstream's arguments: {error}") from error
    finally:
        engine.precision = precision
        for module, mode in modes.items():
            module.training = mode
    tolerance = 1e-3 if weight.itemsize >= 4 else 5e-2
    difference = (ours - own).abs().max().item() / max(own.abs().max().item(), 1e-6)
    if not difference <= tolerance:
        raise InputError(
            f"model: {name or 'it'} has the parameters of upstream's Aggregator but computes something else "
            f"(relative difference {difference:.1e} on a random input)"
        )


def _arguments(aggregator: Any) -> dict[str, Any]:
    """Constructor arguments that an object built like upstream's Aggregator must have had."""
    layer = aggregator.layers[0]
    block, classes = layer.swin_block.block_1, layer.attention
    guidance, text = aggregator.guidance_projection, aggregator.text_guidance_projection
    decoder_guidance = aggregator.decoder_guidance_projection
    decoders = (aggregator.decoder1, aggregator.decoder2)
    pooling = getattr(classes.pool, "kernel_size", None)
    return {
        "text_guidance_dim": text[0].in_features if text is not None else 0,
        "text_guidance_proj_dim": text[0].out_features if text is not None else 0,
        "appearance_guidance_dim": guidance[0].in_channels if guidance is not None else 0,
        "appearance_guidance_proj_dim": guidance[0].out_channels if guidance is not None else 0,
        "decoder_dims": [up.conv.double_conv[0].out_channels for up in decoders],
        "decoder_guidance_dims": [g[0].in_channels for g in decoder_guidance or []] or [0],
        "decoder_guidance_proj_dims": [up.up.in_channels - up.up.out_channels for up in decoders],
        "num_layers": len(aggregator.layers),
        "nheads": block.attn.num_heads,
        "hidden_dim": aggregator.conv1.out_channels,
        "pooling_size": (pooling, pooling) if isinstance(pooling, int) else pooling,
        "feature_resolution": tuple(block.input_resolution),
        "window_size": block.window_size,
        "attention_type": "linear" if hasattr(classes.attention.attention, "eps") else "full",
        "prompt_channel": aggregator.conv1.in_channels,
        "pad_len": getattr(classes, "pad_len", 0),
    }


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
