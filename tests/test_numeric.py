"""Numbers as users pass them: each argument takes Python's and numpy's, and names itself when it refuses."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from catseg_fast import CATSeg
from catseg_fast.cli.main import app
from catseg_fast.data.frames import open_frames
from catseg_fast.engine.schedule import parse_bytes
from catseg_fast.errors import CATSegError, InputError, InputTypeError
from catseg_fast.inference.images import load_image
from catseg_fast.inference.tiles import TileGrid
from catseg_fast.labels import check_min_score
from catseg_fast.numeric import real, share, whole
from catseg_fast.output.overlay import overlay
from catseg_fast.training import Recipe
from support.tiny import CLASSES, picture, tiny_model

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [True, False, np.True_, "1", b"1", None, [1], (), {}, Decimal(1), 1j, object(), torch.ones(2)]
NOT_WHOLE = [*NO_NUMBERS, 1.0, 0.5, NAN, INF, np.float32(1), np.array([1]), Fraction(1)]


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", sliding_window=False)


@pytest.mark.parametrize("value", [1, np.int64(1), np.uint8(1), torch.tensor(1), np.array(1)], ids=repr)
def test_whole_numbers(value: Any) -> None:
    number = whole(value, "x")
    assert (number, type(number)) == (1, int)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(InputTypeError, match=r"^x: expected a whole number, got "):
        whole(value, "x")


def test_whole_numbers_out_of_range() -> None:
    for value, least, text in ((0, 1, "0 is not positive"), (-(10**5000), 3, "is not at least 3")):
        with pytest.raises(InputError, match=f"^x: .*{text}$") as caught:
            whole(value, "x", least)
        assert len(str(caught.value)) < 100
    assert whole(-3, "x", None) == -3
    assert whole(0, "x", 0) == 0


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float16(0.5), Fraction(1, 2)], ids=repr)
def test_real_numbers(value: Any) -> None:
    for check in (real, share, check_min_score):
        number = check(value, "x")
        assert (number, type(number)) == (0.5, float)
    assert real(10**400, "x") == INF
    assert real(-(10**400), "x") == -INF


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value: Any) -> None:
    for check in (real, share, check_min_score):
        with pytest.raises(InputTypeError, match=r"^x: expected a number, got "):
            check(value, "x")


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1.1, -0.1, 10**400], ids=repr)
def test_what_is_no_share(value: Any) -> None:
    for check in (share, check_min_score):
        with pytest.raises(InputError, match=r"^x: expected a (number|probability) in 0..1, got "):
            check(value, "x")


def changed(name: str) -> Callable[[CATSeg, Any], object]:
    def change(model: CATSeg, value: Any) -> None:
        owner = model if hasattr(model, name) else model.engine
        before = getattr(owner, name)
        try:
            setattr(owner, name, value)
        finally:
            setattr(owner, name, before)

    return change


IMAGE = picture(20, 30).byte()
COUNTS: dict[str, Callable[[CATSeg, Any], object]] = {
    "top_k": lambda model, value: model.segment(IMAGE, top_k=value),
    "tiles": lambda model, value: model.segment(IMAGE, tiles=value),
    "overlap": lambda model, value: TileGrid((9, 9), 9, value),
    "max_pixels": lambda model, value: load_image(IMAGE, max_pixels=value),
    "max_classes": changed("max_classes"),
    "chunk": changed("chunk"),
    "sizes": lambda model, value: model.warmup([(value, 20)]),
    "crops": lambda model, value: model.explain(value),
    "every": lambda model, value: open_frames(Path("none"), value),
    **{
        name: lambda model, value, name=name: Recipe(**{name: value})  # type: ignore[misc]
        for name in ("steps", "batch_size", "accumulate", "warmup", "pooling", "crop_size", "seed")
    },
    "classes_per_step": lambda model, value: Recipe(classes_per_step=value),
    "min_sizes": lambda model, value: Recipe(min_sizes=(value,)),
}
OPTIONAL = ("crops", "top_k", "tiles", "max_pixels", "max_classes", "chunk", "classes_per_step")


@pytest.mark.parametrize("argument", COUNTS)
def test_arguments_that_count(argument: str, model: CATSeg) -> None:
    for value in NOT_WHOLE:
        if value is None and argument in OPTIONAL:
            continue
        with pytest.raises(CATSegError, match=f"^{argument}: expected a whole number, got "):
            COUNTS[argument](model, value)
    with pytest.raises(InputError, match=rf"^{argument}: -1 is not "):
        COUNTS[argument](model, -1)


SHARES: dict[str, Callable[[CATSeg, Any], object]] = {
    "min_score": lambda model, value: model.segment(IMAGE, min_score=value),
    "alpha": lambda model, value: overlay(IMAGE, IMAGE[0].int() * 0, CLASSES, value),
    "present": lambda model, value: overlay(IMAGE, IMAGE[0].int() * 0, CLASSES, present=value),
    **{
        name: lambda model, value, name=name: Recipe(**{name: value})  # type: ignore[misc]
        for name in ("lr", "clip_multiplier", "backbone_multiplier", "weight_decay", "clip_grad")
    },
}


@pytest.mark.parametrize("argument", SHARES)
def test_arguments_that_are_real(argument: str, model: CATSeg) -> None:
    for value in NO_NUMBERS:
        if value is not None or argument != "min_score":
            with pytest.raises(InputTypeError, match=f"^{argument}: expected a number, got "):
                SHARES[argument](model, value)
    for value in (NAN, INF, -INF, -1, np.float64(NAN)):
        with pytest.raises(InputError, match=f"^{argument}: "):
            SHARES[argument](model, value)
    SHARES[argument](model, np.float32(0.5))


@pytest.mark.parametrize("text", ["9" * 400 + "GB", "1e400", "nan", "-1GB", "0", "0x10", "1_000", "5%", ""])
def test_amounts_of_memory(text: str) -> None:
    if text[:1] == "9":
        assert parse_bytes(text) == int("9" * 400) * 10**9
        return
    with pytest.raises(InputError, match=r"^memory_budget: "):
        parse_bytes(text)


def test_amounts_of_memory_as_numbers() -> None:
    for amount in (2e9, np.float64(2e9), 2 * 10**9, np.int64(2 * 10**9), "2GB"):
        assert parse_bytes(amount) == 2 * 10**9
    for amount in (NAN, INF, 0, 0.5, -1, True, None, Decimal(1)):
        with pytest.raises(CATSegError, match=r"^memory_budget: "):
            parse_bytes(amount)  # type: ignore[arg-type]


def test_more_classes_per_pixel_than_there_are_take_no_memory(model: CATSeg) -> None:
    for image in (IMAGE, model.encode(IMAGE)):
        answer = model.segment(image, top_k=10**30)
        assert answer.top_labels is not None
        assert answer.top_labels.shape == (len(CLASSES), 20, 30)


@pytest.mark.parametrize("value", ["False", 0, 1, NAN, [], np.int64(1), torch.tensor(True)], ids=repr)
def test_a_sliding_window_is_true_or_false(value: Any, model: CATSeg) -> None:
    for call in (model.segment, model.encode, lambda x, **y: model.segment_batch([x], **y)):
        with pytest.raises(InputTypeError, match=r"^sliding_window: expected True or False, got "):
            call(IMAGE, sliding_window=value)
    assert model.segment(IMAGE, sliding_window=np.False_).readout is None  # type: ignore[call-overload]


def test_numbers_of_numpy_are_kept_as_pythons(model: CATSeg, tmp_path: Path) -> None:
    """JSON, and what reads checkpoints, does not take those of numpy."""
    model.segment(IMAGE, min_score=np.float32(0.5)).save(tmp_path)  # type: ignore[call-overload]
    recipe = Recipe(lr=np.float32(0.5), steps=np.int64(3), min_sizes=[np.int64(4)], clip_grad=0)  # type: ignore[arg-type]
    assert {type(recipe.lr), type(recipe.clip_grad)} == {float}
    assert (type(recipe.steps), recipe.min_sizes) == (int, (4,))


def test_labels_by_index(model: CATSeg) -> None:
    answer = model.segment(IMAGE, keep_logits=True)
    assert torch.equal(answer.mask(np.int64(1)), answer.mask(1))  # type: ignore[arg-type]
    for value in (True, 1.0, None, Decimal(1)):
        with pytest.raises(InputTypeError, match="label: expected a class's index or name"):
            answer.mask(value)  # type: ignore[arg-type]


def test_a_seed_beyond_64_bits() -> None:
    with pytest.raises(InputError, match=r"^seed: 9223372036854775808 is not below 2\^63"):
        Recipe(seed=2**63)


@pytest.mark.parametrize("option", ["--min-score", "--present", "--alpha", "--fps"])
def test_nan_is_in_no_range(option: str, tmp_path: Path) -> None:
    """It is refused before anything is read."""
    result = CliRunner().invoke(app, ["segment", str(tmp_path), "--classes", "sky", option, "nan"])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in " ".join(result.output.split())
