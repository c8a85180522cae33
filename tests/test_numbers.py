"""NaN that must not be lost, budgets that count only what is needed, sizes that do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast import Aggregator, reference
from catseg_fast.backend import why_no_triton
from catseg_fast.errors import InputError
from catseg_fast.kernels.attention import VECTOR, attend

SIZES: dict[str, Any] = {
    "text_guidance_dim": 8, "text_guidance_proj_dim": 16, "appearance_guidance_dim": 8,
    "appearance_guidance_proj_dim": 16, "decoder_dims": (32, 16), "decoder_guidance_dims": (4, 4),
    "decoder_guidance_proj_dims": (8, 4), "num_layers": 1, "nheads": 2, "hidden_dim": 32,
    "pooling_size": None, "feature_resolution": (4, 4), "window_size": 2, "prompt_channel": 1, "pad_len": 0,
}  # fmt: skip
NAN, INF = float("nan"), float("inf")
NO_TRITON = pytest.mark.skipif(why_no_triton("cpu") is not None, reason="no Triton on the CPU")
# Back end, side of the window, and content of the guidance; the interpreter takes seconds for one.
BROKEN = [
    *itertools.product(("reference", "torch"), (1, 2, 3, 4), (NAN, INF)),
    pytest.param("triton", 2, NAN, marks=NO_TRITON),
]
KINDS = (Aggregator, reference.Aggregator)


def make(kind: type[Any] = Aggregator, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return kind(**{**SIZES, **sizes}).eval().requires_grad_(False)


def inputs(height: int = 4, width: int = 4, classes: int = 3) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    maps = [
        torch.randn(1, channels, height << index, width << index, generator=generator)
        for index, channels in enumerate((8, 4, 4))
    ]
    image = torch.randn(1, 8, height, width, generator=generator)
    return image, torch.randn(1, classes, 1, 8, generator=generator), maps


# ---- NaN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "side", "value"), BROKEN)
def test_guidance_that_is_not_finite_is_seen(backend: str, side: int, value: float) -> None:
    """All queries and keys of the only window are NaN, so that the reference returns only NaN."""
    aggregator = make(window_size=side, feature_resolution=(side, side))
    aggregator.backend = backend
    image, text, maps = inputs(side, side)
    assert aggregator(image, text, maps).isfinite().all()
    maps[0][0, 0, 0, 0] = value
    assert aggregator(image, text, maps).isnan().all()


@pytest.mark.parametrize("classes", [1, 2, 5, 17])
@pytest.mark.parametrize("attention", ["linear", "full"])
def test_a_class_of_nan_is_seen(attention: str, classes: int) -> None:
    """Class attention has as many keys as there are classes."""
    aggregator = make(attention_type=attention)
    image, text, maps = inputs(classes=classes)
    text[0, 0] = float("nan")
    nan = []
    for backend in ("reference", "torch"):
        aggregator.backend = backend
        nan.append(aggregator(image, text, maps).isnan())
    assert nan[0].all()
    assert nan[1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 3, 4, 7, 8, 9, 15, 16, 31, VECTOR])
def test_attention_of_nan(keys: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 1, keys, 8, generator=torch.Generator().manual_seed(keys)).to(dtype)
    many = keys >= VECTOR
    finite = attend(q, k, v, many=many)
    torch.testing.assert_close(finite, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    broken = q.clone()
    broken[0, 0, 0, 3] = float("nan")
    answer = attend(broken, k, v, many=many)
    assert answer[0, 0, 0].isnan().all()
    assert torch.equal(answer[0, 0, 1:], finite[0, 0, 1:])
    assert torch.equal(answer[1], finite[1])
    for index in (0, keys - 1):
        broken = k.clone()
        broken[1, 0, index, 0] = float("nan")
        answer = attend(q, broken, v, many=many)
        assert answer[1].isnan().all()
        assert torch.equal(answer[0], finite[0])


def test_large_finite_values_are_no_nan() -> None:
    """The sum that finds NaN must not overflow."""
    q = torch.full((1, 1, 4, 32), 60_000.0, dtype=torch.bfloat16) * 1e33
    assert q.isfinite().all()
    answer = attend(q, torch.zeros_like(q), torch.ones_like(q), many=False)
    assert torch.equal(answer, torch.ones_like(q))


# ---- budgets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("chunk", [3, 4, 64, 10**9])
def test_a_chunk_of_more_classes_than_there_are_needs_no_more(chunk: int, gradients: bool) -> None:
    aggregator = make().requires_grad_(gradients)
    aggregator.engine.checkpoint = True if gradients else None
    image, text, maps = inputs()
    aggregator.engine.chunk = 3
    aggregator.engine.memory_budget = 1
    with pytest.raises(InputError, match="does not hold") as caught:
        aggregator(image, text, maps)
    least = int(str(caught.value).rpartition("(")[2].split()[0])
    aggregator.engine.memory_budget = least
    expected = aggregator(image, text, maps)
    aggregator.engine.chunk = chunk
    assert torch.equal(aggregator(image, text, maps), expected)
    aggregator.engine.memory_budget = least - 1
    with pytest.raises(InputError, match=f"memory_budget: .* does not hold 3 of 3 classes.*{least} bytes"):
        aggregator(image, text, maps)


# ---- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"feature_resolution": (5, 4)}, r"feature_resolution: \(5, 4\) is not divisible by the window 2"),
        ({"feature_resolution": (0, 4)}, r"feature_resolution: \(0, 4\) is not positive"),
        ({"window_size": 0}, "window_size: 0 is not positive"),
        ({"pooling_size": (0, 1)}, r"pooling_size: \(0, 1\) is not positive"),
        ({"pooling_size": (-1, 2)}, r"pooling_size: \(-1, 2\) is not positive"),
        ({"nheads": 3}, "hidden_dim: 32 is not divisible by nheads 3"),
        ({"nheads": 0}, "nheads: 0 is not positive"),
        ({"hidden_dim": 0}, "hidden_dim: 0 is not positive"),
        ({"decoder_dims": (8, 16)}, r"decoder_dims: \(8, 16\)"),
    ],
)
def test_sizes_of_the_constructor(kind: type[Any], sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(kind, **sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("pooling", "height", "width", "message"),
    [
        ((6, 6), 4, 4, "resolution 4x4 is smaller than the pooling 6x6"),
        ((5, 1), 4, 4, "resolution 4x4 is smaller than the pooling 5x1"),
        ((2, 2), 1, 4, "resolution 1x4 is smaller than the pooling 2x2"),
        ((1, 1), 5, 4, "resolution.* 5x4 is not divisible by the window 2"),
        ((1, 1), 6, 7, "resolution.* 6x7 is not divisible by the window 2"),
        ((1, 1), 2, 3, "resolution.* 2x3 is not divisible by the window 2"),
    ],
)
def test_sizes_of_a_map(
    kind: type[Any], pooling: tuple[int, int], height: int, width: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(kind, pooling_size=pooling)(*inputs(height, width))


def drop(maps: list[Tensor]) -> list[Any]:
    return maps[:2]


def none(maps: list[Tensor]) -> list[Any]:
    return [None, *maps[1:]]


def narrow(maps: list[Tensor]) -> list[Any]:
    return [maps[0], maps[1][..., :5], maps[2]]


def thin(maps: list[Tensor]) -> list[Any]:
    return [maps[0][:, :3], *maps[1:]]


def double(maps: list[Tensor]) -> list[Any]:
    return [x.repeat(2, 1, 1, 1) for x in maps]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "appearance_guidance: expected 3 maps, got 2"),
        (none, r"appearance_guidance\[0\]: expected shape \(1, 8, 4, 4\) .*, got None"),
        (narrow, r"appearance_guidance\[1\]: expected shape \(1, 4, 8, 8\) .*, got \(1, 4, 8, 5\)"),
        (thin, r"appearance_guidance\[0\]: expected shape \(1, 8, 4, 4\) .*, got \(1, 3, 4, 4\)"),
        (double, r"appearance_guidance\[0\]: expected shape \(1, 8, 4, 4\) .*, got \(2, 8, 4, 4\)"),
    ],
)
def test_guidance_that_does_not_fit(
    kind: type[Any], change: Callable[[list[Tensor]], list[Any]], message: str
) -> None:
    image, text, maps = inputs()
    with pytest.raises(InputError, match=message):
        make(kind)(image, text, change(maps))
