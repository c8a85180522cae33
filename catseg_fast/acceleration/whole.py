"""A whole aggregator in the engine."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from catseg_fast import reference
from catseg_fast.acceleration import trial
from catseg_fast.acceleration.comparing import COARSE, differs, differs_in_16_bits
from catseg_fast.acceleration.part import Inputs, Part
from catseg_fast.acceleration.reading import read_aggregator
from catseg_fast.acceleration.trial import CROPS, Random, Resolution
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.folding import Plan
from catseg_fast.reference.shapes import check_shapes

ARGUMENTS = ("img_feats", "text_feats", "appearance_guidance")


class GuardedEngine(Engine):
    """An engine whose weights its owner watches."""

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        kept = None if torch.compiler.is_compiling() else self._plans.get(dtype or self._compute_dtype())
        return super().plan(dtype) if kept is None else kept[1]

    def computes_in(self) -> torch.dtype:
        """Return the type of the next call's stages."""
        return self._compute_dtype()


class WholeAggregator(Part):
    """An aggregator built like upstream's."""

    kind = "aggregator"

    def __init__(self, module: nn.Module, name: str, verify: bool = True) -> None:
        super().__init__(module, name, verify)
        self.engine = GuardedEngine(nn.Module())
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]

    def read(self) -> None:
        self.engine.aggregator = read_aggregator(self.module)
        self.engine.forget()

    def check_code(self) -> None:
        trial.check_code(self.module, make_inputs, prepare)

    def settings(self) -> object:
        engine = self.engine
        return (engine.backend, engine.precision, engine.input_precision)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Inputs | None:
        if len(args) + len(kwargs) != 3:
            return None
        try:
            img_feats, text_feats, guidance = (*args, *(kwargs[name] for name in self._names[len(args) : 3]))
        except (KeyError, ValueError):
            return None
        if not isinstance(img_feats, Tensor) or not isinstance(text_feats, Tensor):
            return None
        if not isinstance(guidance, (list, tuple)):
            return None
        check_shapes(self.module, img_feats, text_feats, guidance)
        return img_feats, text_feats, guidance

    def run(self, inputs: Inputs) -> Tensor:
        img_feats, text_feats, guidance = inputs
        return self.engine.logits(img_feats, text_feats, guidance, max_classes(self.module))

    def compare(self, args: Sequence[Any], kwargs: dict[str, Any], inputs: Inputs) -> tuple[Any, str | None]:
        try:
            own = self.own(args, kwargs)
        except RuntimeError:
            own = None
            if not self._in_16_bits(inputs[0].device):
                raise
        try:
            ours = self.run(inputs)
        except Exception as error:  # the engine must never be the reason why a model does not run
            if own is None:
                raise
            return own, f"the engine fails: {type(error).__name__}: {error}"
        if own is None or self._in_16_bits(inputs[0].device):
            truth = in_full_precision(self.module, inputs)
            if own is None:  # such as upstream's selection of classes, which mixes types
                return ours, differs(ours.to(truth.dtype), truth, COARSE)
            return own, differs_in_16_bits(ours, own, truth)
        if self.engine.computes_in() in (torch.float32, torch.float64):
            return own, differs(ours, own)
        precision, self.engine.precision = self.engine.precision, own.dtype
        try:
            exact = self.run(inputs)
        finally:
            self.engine.precision = precision
        return own, differs(exact, own) or differs(ours, own, COARSE)

    def _in_16_bits(self, device: torch.device) -> bool:
        if torch.is_autocast_enabled(device.type):
            return True
        return any(parameter.itemsize < 4 for parameter in self.module.parameters())


def max_classes(aggregator: nn.Module) -> int | None:
    """Above how many classes an aggregator drops some: its own setting, or upstream's `pad_len`."""
    if isinstance(aggregator, reference.Aggregator):
        return aggregator.max_classes
    return getattr(aggregator, "pad_len", 0) or None


def in_full_precision(module: nn.Module, inputs: Inputs) -> Tensor:
    """The answer of a module's own code in fp32."""
    duplicate = copy.deepcopy(module).float()
    with torch.autocast(inputs[0].device.type, enabled=False):
        answer: Tensor = type(duplicate).forward(duplicate, *map(_full, inputs))
    return answer


def _full(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.float() if item.is_floating_point() else item
    return type(item)(map(_full, item)) if isinstance(item, (list, tuple)) else item


def make_inputs(
    aggregator: Any, size: Resolution | None, random: Random, classes: int, scale: float
) -> tuple[Any, ...]:
    """Random features of some classes, which are more or less like those of some positions, and guidance."""
    height, width = size or aggregator.layers[0].swin_block.block_1.input_resolution
    prompts = aggregator.conv1.in_channels
    features = _width(aggregator.text_guidance_projection, 2) or 64
    image = random.normal(CROPS, features, height, width)
    places = random.index(height * width, CROPS, classes)
    alike = image.flatten(2).gather(2, places[:, None].expand(-1, features, -1)).transpose(1, 2)
    text = alike[:, :, None] + random.normal(CROPS, classes, prompts, features)
    channels = [_width(aggregator.guidance_projection, 4)]
    decoder = aggregator.decoder_guidance_projection
    channels += [0, 0] if decoder is None else [_width(projection, 4) for projection in decoder]
    guidance = [
        random.normal(CROPS, count, k * height, k * width) * scale if count else None
        for count, k in zip(channels, (1, 2, 4), strict=False)
    ]
    return image * scale, text * scale, guidance


def prepare(aggregator: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return what computes the engine's answers for an aggregator in torch."""
    engine = Engine(read_aggregator(aggregator))
    engine.backend, engine.precision = "torch", dtype
    return functools.partial(engine.logits, max_classes=max_classes(aggregator))


def _width(projection: nn.Module | None, ndim: int) -> int:
    """Channels that a projection takes; 0 without one."""
    if projection is None:
        return 0
    return next((x.shape[1] for x in projection.parameters() if x.ndim == ndim), 0)
