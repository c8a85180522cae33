"""Aggregators in the manner of derived projects: their parts in the engine, or the whole by an adapter."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catseg_fast import accelerate
from catseg_fast.acceleration import Acceleration, Adapter
from catseg_fast.errors import InputError, InputTypeError
from support import derived
from support.derived import RotatedAdapter, RotatedMaps, TemperatureAdapter, WithTemperature
from support.upstream_like import Aggregator, make_aggregator, make_inputs

NO_LIMIT = {"pad_len": 0}


def arguments(kind: type[Aggregator], classes: int, crops: int) -> tuple[Any, ...]:
    image, text, guidance = make_inputs(classes, crops)
    if kind is WithTemperature:
        return image, text, guidance, 0.5
    if kind is RotatedMaps:
        return [image, image.flip(3)], text[:, :, :1], guidance
    return image, text, guidance


def compare(aggregator: nn.Module, own: nn.Module, kind: type[Aggregator]) -> None:
    for classes, crops in ((1, 2), (5, 1), (9, 2)):
        given = arguments(kind, classes, crops)
        expected = own(*given)
        for _ in range(2):
            torch.testing.assert_close(aggregator(*given), expected, rtol=0, atol=5e-5)


def in_the_engine(acceleration: Acceleration) -> list[str]:
    return sorted(f"{part.name} {part.kind}" for part in acceleration.parts if part.refusal is None)


LAYER = ["layers.0.attention class layer", "layers.0.swin_block window blocks"]
MORE = [f"more_{part}" for part in LAYER]

DERIVED = {
    "ParallelBlocks": [" decoder", *LAYER],
    "WithTemperature": [" decoder", *LAYER],
    "RotatedMaps": [" decoder", *LAYER],
    "TwoStacks": [" decoder", *LAYER, *MORE],
    "OtherCostVolume": [" decoder", *LAYER],
}


@torch.no_grad()
@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("pad_len", [4, 0])
def test_parts_run_in_the_engine(name: str, pad_len: int) -> None:
    kind = getattr(derived, name)
    changes = {"prompt_channel": 2, "pooling_size": (2, 2) if pad_len else None}
    aggregator = make_aggregator(kind, pad_len=pad_len, **changes)
    own = copy.deepcopy(aggregator)
    with pytest.warns(
        RuntimeWarning, match=f"model: it is not upstream's Aggregator: .*{len(DERIVED[name])} of its parts"
    ):
        acceleration = accelerate(aggregator)
    assert in_the_engine(acceleration) == DERIVED[name]
    assert not acceleration.engines
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compare(aggregator, own, kind)
    lines = acceleration.explain().splitlines()
    assert len(lines) == len(DERIVED[name])
    assert all(re.search(r"the engine; \d kinds? of input compared", line) for line in lines)
    acceleration.restore()
    assert all(type(x) is type(y) for x, y in zip(aggregator.modules(), own.modules(), strict=True))


ADAPTED: dict[type[Aggregator], Adapter] = {
    WithTemperature: TemperatureAdapter(),
    RotatedMaps: RotatedAdapter(),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_bring_the_whole_into_the_engine(kind: type[Aggregator]) -> None:
    aggregator = make_aggregator(kind, pad_len=4 if kind is WithTemperature else 0)
    own = copy.deepcopy(aggregator)
    acceleration = accelerate(aggregator, adapters=ADAPTED)
    assert in_the_engine(acceleration) == [" aggregator, by an adapter"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compare(aggregator, own, kind)


@torch.no_grad()
def test_keywords_go_through_an_adapter() -> None:
    aggregator = make_aggregator(WithTemperature)
    own = copy.deepcopy(aggregator)
    accelerate(aggregator, adapters=ADAPTED)
    image, text, guidance = make_inputs()
    for temperature in (0.5, 0.5, 2.0, 2.0):
        given = {"appearance_guidance": guidance, "temperature": temperature}
        expected = own(image, text, **given)
        found = aggregator(image, text, guidance, temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


class Forgetful(TemperatureAdapter):
    """Forgets what it is for."""

    def finish(self, aggregator: nn.Module, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return logits


class Failing(TemperatureAdapter):
    def inputs(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("image")


@torch.no_grad()
@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (Forgetful(), "it computes something different"),
        (Failing(), "the adapter's Failing.inputs fails: KeyError: 'image'"),
        (Adapter(), "the adapter's Adapter.example fails: NotImplementedError"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Adapter) else x,
)
def test_wrong_adapters_are_refused(adapter: Adapter, reason: str) -> None:
    aggregator = make_aggregator(WithTemperature)
    own = copy.deepcopy(aggregator)
    with pytest.warns(RuntimeWarning, match=f"model: it is not upstream's Aggregator: {re.escape(reason)}"):
        accelerate(aggregator, adapters={WithTemperature: adapter})
    compare(aggregator, own, WithTemperature)


def test_adapters_are_instances() -> None:
    with pytest.raises(InputTypeError, match="adapters: expected an Adapter for WithTemperature, got <class"):
        accelerate(make_aggregator(WithTemperature), adapters={WithTemperature: TemperatureAdapter})  # type: ignore[dict-item]


@torch.no_grad()
def test_parts_in_a_model_without_an_aggregator() -> None:
    layer = make_aggregator().layers[0]
    model = nn.ModuleDict({"mine": layer})
    x, guidance, text = torch.randn(2, 32, 5, 8, 8), torch.randn(2, 16, 8, 8), torch.randn(2, 5, 16)
    own = copy.deepcopy(layer)
    acceleration = accelerate(model)
    assert in_the_engine(acceleration) == ["mine.attention class layer", "mine.swin_block window blocks"]
    for _ in range(2):
        torch.testing.assert_close(layer(x, guidance, text), own(x, guidance, text), rtol=0, atol=5e-5)


@torch.no_grad()
def test_a_hook_takes_only_its_part_out(recwarn: pytest.WarningsRecorder) -> None:
    aggregator = make_aggregator()
    acceleration = accelerate(aggregator)
    given, seen = make_inputs(7, 2), []
    aggregator(*given)
    hook = aggregator.layers[0].swin_block.block_1.register_forward_hook(lambda m, i, out: seen.append(out))
    own = copy.deepcopy(aggregator)(*given)
    seen.clear()
    for _ in range(3):
        torch.testing.assert_close(aggregator(*given), own, rtol=0, atol=5e-5)
    assert len(seen) == 3
    assert in_the_engine(acceleration) == [" decoder", "layers.0.attention class layer"]
    assert len([w for w in recwarn if "forward hook" in str(w.message)]) == 1
    hook.remove()
    for _ in range(3):
        torch.testing.assert_close(aggregator(*given), own, rtol=0, atol=5e-5)
    assert " aggregator" in in_the_engine(acceleration)
    assert len(seen) == 3


class Gained(RotatedMaps):
    gain = 1.0

    def conv_decoder(self, x: Tensor, guidance: Any) -> Tensor:
        return super().conv_decoder(x, guidance) * self.gain


@torch.no_grad()
def test_attributes_around_a_part_are_watched() -> None:
    aggregator = make_aggregator(Gained)
    with pytest.warns(RuntimeWarning, match="3 of its parts"):
        accelerate(aggregator)
    compare(aggregator, copy.deepcopy(aggregator), RotatedMaps)
    aggregator.gain = 2.0
    with pytest.warns(RuntimeWarning, match="the code was checked again|computes something different"):
        compare(aggregator, copy.deepcopy(aggregator), RotatedMaps)


def test_messages_name_the_nearest_candidate() -> None:
    aggregator = make_aggregator()
    del aggregator.head
    aggregator.layers = nn.ModuleList()
    with pytest.raises(
        InputError,
        match=r"found in this ModuleDict; the nearest is 'x' \(Aggregator\), which lacks head$",
    ):
        accelerate(nn.ModuleDict({"x": aggregator}))
