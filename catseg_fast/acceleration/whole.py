"""A whole aggregator in the engine."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from catseg_fast import reference
from catseg_fast.acceleration import trial
from catseg_fast.acceleration.comparing import differs, differs_in_16_bits, differs_roughly
from catseg_fast.acceleration.part import Inputs, Part
from catseg_fast.acceleration.reading import read_aggregator
from catseg_fast.acceleration.trial import CROPS, Factors, Random, Resolution, by_crop
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.free_memory import free_bytes
from catseg_fast.reference.shapes import check_shapes

# Memory of the module's own code per class and position, in units of the hidden channels: around an MLP,
# or around the scores of a window attention.
OWN_NUMBERS = 16

# Of random features of a crop, how much is in the half of the channels that the classes have.
FAINT = 0.05


class GuardedEngine(Engine):
    """An engine whose weights its owner watches."""

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        kept = self._plans.get(dtype or self._compute_dtype())
        return super().plan(dtype) if kept is None else kept[1]

    def computes_in(self) -> torch.dtype:
        """Return the type of the next call's stages."""
        return self._compute_dtype()


class WholeAggregator(Part):
    """An aggregator built like upstream's."""

    kind = "aggregator"
    divisible = True  # a call can be made of fewer of its classes

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
        return img_feats, text_feats, guidance

    def run(self, inputs: Inputs) -> Tensor:
        img_feats, text_feats, guidance = inputs
        if not self.verify:
            check_shapes(self.module, img_feats, text_feats, guidance)
        return self.engine.logits(img_feats, text_feats, guidance, max_classes(self.module))

    def compare(self, args: Sequence[Any], kwargs: dict[str, Any], inputs: Inputs) -> tuple[Any, str | None]:
        if self.divisible and not self._fits(inputs):
            return self._compare_fewer(inputs)
        try:
            own = self.own(args, kwargs)
        except torch.OutOfMemoryError:
            if not self.divisible:
                raise
            return self._compare_fewer(inputs)
        except Exception as error:
            if self.divisible:
                with suppress(AttributeError, TypeError):  # of projections that are not upstream's
                    check_shapes(self.module, *inputs)
            if not isinstance(error, RuntimeError) or not self._in_16_bits():
                raise
            own = None
        if own is not None and not isinstance(own, Tensor):
            return own, f"it returns a {type(own).__name__}, expected a tensor"
        try:
            ours = self.run(inputs)
        except Exception as error:  # the engine must never be the reason why a model does not run
            if own is None:
                raise
            return own, f"the engine fails: {type(error).__name__}: {error}"
        if own is None or self._in_16_bits():
            truth = in_full_precision(self.module, args, kwargs)
            if own is None:  # such as upstream's selection of classes, which mixes types
                return ours, differs_roughly(ours, truth)
            return own, differs_in_16_bits(ours, own, truth)
        if self.engine.computes_in() in (torch.float32, torch.float64):
            return own, differs(ours, own)
        precision, self.engine.precision = self.engine.precision, own.dtype
        try:
            exact = self.run(inputs)
        finally:
            self.engine.precision = precision
        return own, differs(exact, own) or differs_roughly(ours, own)

    def _fits(self, inputs: Inputs) -> bool:
        """Check whether the module's own code has memory for a call."""
        (B, _, H, W), T, channels = (
            inputs[0].shape,
            inputs[1].shape[1],
            self.engine.aggregator.conv1.out_channels,
        )
        count = min(T, max_classes(self.module) or T)
        needed = OWN_NUMBERS * B * count * H * W * channels * inputs[0].itemsize
        return count == 1 or needed < free_bytes(self.device)

    def _compare_fewer(self, inputs: Inputs) -> tuple[Any, str | None]:
        """Compare where the module's own code has no memory for all classes: for the first half of them."""
        image, text, guidance = inputs
        half = (image, text[:, : max(1, text.shape[1] // 2)], guidance)
        return self.run(inputs), self.compare(half, {}, half)[1]

    def _in_16_bits(self) -> bool:
        if torch.is_autocast_enabled(self.device.type):
            return True
        return any(parameter.itemsize < 4 for parameter in self.module.parameters())


def max_classes(aggregator: nn.Module) -> int | None:
    """Return the number of classes above which an aggregator drops some, such as upstream's `pad_len`."""
    if isinstance(aggregator, reference.Aggregator):
        return aggregator.max_classes
    return getattr(aggregator, "pad_len", 0) or None


def in_full_precision(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], method: str = "forward"
) -> Tensor:
    """The answer of a module's own code in fp32."""
    duplicate = copy.deepcopy(module).float()
    with torch.autocast(next(duplicate.parameters()).device.type, enabled=False):
        answer: Tensor = getattr(type(duplicate), method)(duplicate, *_full(args), **_full(kwargs))
    return answer


def _full(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.float() if item.is_floating_point() else item
    if isinstance(item, dict):
        return {key: _full(value) for key, value in item.items()}
    return type(item)(map(_full, item)) if type(item) in (list, tuple) else item


def make_inputs(
    aggregator: Any,
    size: Resolution | None,
    random: Random,
    classes: int,
    factors: Factors,
    prompts: int | None = None,
) -> tuple[Any, ...]:
    """Return random features and guidance.

    Classes of the first crop are very like a position, like none, and the contrary of one, in turn; those of
    the second are all but orthogonal to its positions: what treats classes apart by their scores shows.
    """
    height, width = size or aggregator.layers[0].swin_block.block_1.input_resolution
    prompts = prompts or aggregator.conv1.in_channels
    features = _width(aggregator.text_guidance_projection, 2) or 64
    image = random.normal(CROPS, features, height, width)
    text = random.normal(CROPS, classes, prompts, features)
    places = random.index(height * width, classes)
    for index, likeness in zip(range(classes), itertools.cycle((10.0, 0.0, -1.0)), strict=False):
        text[0, index] += likeness * image[0].flatten(1)[:, places[index]]
    image[1, features // 2 :] *= FAINT
    text[1, ..., : features // 2] *= FAINT
    channels = [_width(aggregator.guidance_projection, 4)]
    decoder = aggregator.decoder_guidance_projection
    channels += [0, 0] if decoder is None else [_width(projection, 4) for projection in decoder]
    guidance = [
        by_crop(random.normal(CROPS, count, k * height, k * width), factors) if count else None
        for count, k in zip(channels, (1, 2, 4), strict=False)
    ]
    return by_crop(image, factors), by_crop(text, factors), guidance


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
