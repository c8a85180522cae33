"""The engine inside models that were built elsewhere."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catseg_fast import accelerate, reference
from catseg_fast.engine.engine import Engine
from support import upstream_like
from support.golden_rule import det, fill, make_input
from support.tiny import tiny_model

ARGUMENTS: dict[str, Any] = {
    "text_guidance_dim": 24, "text_guidance_proj_dim": 16, "appearance_guidance_dim": 20,
    "appearance_guidance_proj_dim": 16, "decoder_dims": (32, 16), "decoder_guidance_dims": (12, 10),
    "decoder_guidance_proj_dims": (8, 4), "num_layers": 2, "nheads": 2, "hidden_dim": 32,
    "pooling_size": (1, 1), "feature_resolution": (12, 12), "window_size": 6, "prompt_channel": 2,
    "pad_len": 0,
}  # fmt: skip


def make_aggregator(**changes: Any) -> reference.Aggregator:
    aggregator = reference.Aggregator(**{**ARGUMENTS, **changes}).eval()
    fill(aggregator, "sem_seg_head.predictor.transformer.")
    return aggregator


def inputs(classes: int = 5, crops: int = 2, **changes: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    prompts = changes.get("prompt_channel", 2)
    image = det("accelerate:image", (crops, 24, 12, 12))
    text = make_input("accelerate:text", "text", (crops, classes, prompts, 24))
    sizes = ((20, 12), (12, 24), (10, 48))
    return image, text, [det(f"accelerate:{n}", (crops, channels, n, n)) for channels, n in sizes]


def make(foreign: bool, **changes: Any) -> nn.Module:
    """The reference, or the same in other classes, which have upstream's attributes only."""
    if not foreign:
        return make_aggregator(**changes)
    return upstream_like.make_aggregator(**{**ARGUMENTS, **changes})


class Predictor(nn.Module):
    """Calls an aggregator deep inside, as upstream's predictor does."""

    def __init__(self, aggregator: nn.Module) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"transformer": aggregator})

    def forward(self, image: Tensor, text: Tensor, guidance: Any) -> Tensor:
        return self.head["transformer"](image, text, guidance).sigmoid()


@pytest.fixture
def engine_calls(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that ran, in order."""
    calls: list[Engine] = []
    logits = Engine.logits

    def counted(self: Engine, *arguments: Any, **options: Any) -> Tensor:
        calls.append(self)
        return logits(self, *arguments, **options)

    monkeypatch.setattr(Engine, "logits", counted)
    return calls


VARIATIONS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1 pooled": {"pooling_size": (2, 2)},
    "v1 full attention": {"attention_type": "full"},
    "v2 padded": {"pad_len": 9},
    "v2 selecting": {"pad_len": 4},
    "v2 unpooled": {"pad_len": 9, "pooling_size": None},
    "one window": {"window_size": 12},
    "no guidance": {"text_guidance_dim": 0, "text_guidance_proj_dim": 0, "pad_len": 9},
    "no decoder guidance": {"decoder_guidance_dims": (0,), "decoder_guidance_proj_dims": (0, 0)},
    "no appearance": {"appearance_guidance_dim": 0, "appearance_guidance_proj_dim": 0},
    "one prompt": {"prompt_channel": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("foreign", [False, True], ids=["reference", "foreign"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_answers_are_the_models_own(variation: str, foreign: bool, engine_calls: list[Engine]) -> None:
    changes = VARIATIONS[variation]
    aggregator = make(foreign, **changes)
    kind = type(aggregator)
    model = Predictor(aggregator)
    batch = inputs(**changes)
    keys = list(model.state_dict())
    own = model(*batch)
    acceleration = accelerate(model)
    assert list(acceleration.engines) == ["head.transformer"]
    assert list(model.state_dict()) == keys
    assert isinstance(aggregator, kind)
    engine_calls.clear()
    assert torch.equal(model(*batch), own)  # the first call of a kind is computed by both
    torch.testing.assert_close(model(*batch), own, rtol=0, atol=1e-5)
    assert engine_calls == 2 * list(acceleration.engines.values())
    acceleration.restore()
    assert torch.equal(model(*batch), own)
    acceleration.restore()  # nothing left to do
    assert len(engine_calls) == 2
    assert type(aggregator) is kind
    assert vars(aggregator).keys() == vars(make(foreign, **changes)).keys()


@torch.no_grad()
def test_an_aggregator_by_itself() -> None:
    aggregator = make_aggregator()
    own = aggregator(*inputs())
    with accelerate(aggregator) as acceleration:
        assert list(acceleration.engines) == [""]
        accelerated = [aggregator(*inputs()) for _ in range(2)][1]
    assert not torch.equal(accelerated, own)  # another order of summation
    torch.testing.assert_close(accelerated, own, rtol=0, atol=1e-4)
    assert torch.equal(aggregator(*inputs()), own)


@torch.no_grad()
def test_an_error_ends_the_acceleration() -> None:
    aggregator = make_aggregator()
    own = aggregator(*inputs())
    with pytest.raises(KeyError), accelerate(aggregator):
        raise KeyError
    assert torch.equal(aggregator(*inputs()), own)


@torch.no_grad()
def test_several_aggregators() -> None:
    first, second = make_aggregator(), make_aggregator(pad_len=4)
    model = nn.ModuleList([first, Predictor(second), first])
    own = [first(*inputs()), second(*inputs())]
    with accelerate(model) as acceleration:
        assert list(acceleration.engines) == ["0", "1.head.transformer"]
        for aggregator, expected in 2 * list(zip((first, second), own, strict=True)):
            torch.testing.assert_close(aggregator(*inputs()), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("foreign", [False, True], ids=["reference", "foreign"])
def test_parameters_are_shared(foreign: bool) -> None:
    aggregator = make(foreign, pad_len=9)
    kind = type(aggregator)
    accelerate(aggregator)
    before = aggregator(*inputs())
    for name in ("conv1.weight", "layers.1.attention.padding_tokens", "decoder2.conv.double_conv.1.weight"):
        aggregator.get_parameter(name).mul_(-1.1)
        aggregator(*inputs())
        after = aggregator(*inputs())
        expected = kind.forward(aggregator, *inputs())
        assert not torch.allclose(after, before, atol=1e-3), name
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)
        before = after


def test_training_and_gradients_run_the_models_own_code(engine_calls: list[Engine]) -> None:
    aggregator = make_aggregator()
    acceleration = accelerate(aggregator)
    engine_calls.clear()
    own = reference.Aggregator.forward(aggregator, *inputs())
    with pytest.warns(RuntimeWarning, match=r"gradients are wanted.*torch.no_grad\(\)"):
        assert torch.equal(aggregator(*inputs()), own)
    aggregator(*inputs()).sum().backward()
    assert aggregator.conv1.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(aggregator.train()(*inputs()), own)
    assert not engine_calls
    with torch.inference_mode():
        aggregator.eval()(*inputs())
    assert engine_calls == list(acceleration.engines.values())
    aggregator.requires_grad_(False)
    engine_calls.clear()
    answer = aggregator(*inputs())  # nothing that needs gradients
    assert engine_calls
    assert not answer.requires_grad


@torch.no_grad()
def test_copies_and_pickles_are_the_models_own(engine_calls: list[Engine]) -> None:
    aggregator = make_aggregator()
    own = aggregator(*inputs())
    accelerate(aggregator)
    file = io.BytesIO()
    torch.save(aggregator, file)
    assert b"acceleration" not in file.getvalue()
    file.seek(0)
    for duplicate in (copy.deepcopy(aggregator), copy.copy(aggregator), torch.load(file, weights_only=False)):
        assert type(duplicate) is reference.Aggregator
        engine_calls.clear()
        assert torch.equal(duplicate(*inputs()), own)
        assert not engine_calls
        accelerate(duplicate).restore()


@torch.no_grad()
def test_replicas_run_the_models_own_code(engine_calls: list[Engine]) -> None:
    aggregator = make_aggregator()
    accelerate(aggregator)
    replica = aggregator._replicate_for_data_parallel()
    replica._parameters = aggregator._parameters.copy()
    engine_calls.clear()
    own = reference.Aggregator.forward(aggregator, *inputs())
    assert torch.equal(replica(*inputs()), own)
    assert not engine_calls


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    aggregator = make_aggregator(pad_len=9).to(dtype)
    image, text, guidance = inputs()
    batch = (image.to(dtype), text.to(dtype), [x.to(dtype) for x in guidance if x is not None])
    own = aggregator(*batch)
    accelerate(aggregator)
    aggregator(*batch)
    accelerated = aggregator(*batch)
    assert accelerated.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    assert (accelerated - own).norm() <= tolerance * own.norm()


def test_nothing_else_changes() -> None:
    aggregator = make_aggregator().train()
    aggregator.layers[0].eval()
    modes, state = [module.training for module in aggregator.modules()], torch.get_rng_state()
    acceleration = accelerate(aggregator, memory_budget="1GiB")
    assert [module.training for module in aggregator.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert acceleration.engines[""].memory_budget == 2**30
    assert all(parameter.grad is None for parameter in aggregator.parameters())


def test_no_aggregator() -> None:
    with pytest.raises(ValueError, match="model: no aggregator was found in this Sequential"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))


def test_models_that_have_an_engine_already() -> None:
    with pytest.raises(ValueError, match=r"model: sem_seg_head.predictor.transformer has an engine already"):
        accelerate(tiny_model())
    aggregator = make_aggregator()
    acceleration = accelerate(aggregator)
    with pytest.raises(ValueError, match="model: it has an engine already"):
        accelerate(aggregator)
    acceleration.restore()
    accelerate(aggregator).restore()


def test_bad_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    aggregator = make_aggregator()
    for backend in ("cuda", "reference"):
        with pytest.raises(ValueError, match=f"backend: '{backend}'"):
            accelerate(aggregator, backend=backend)
    with pytest.raises(ValueError, match="memory_budget: 'plenty'"):
        accelerate(aggregator, memory_budget="plenty")
    with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run: \w+"):
        accelerate(aggregator, backend="triton")
    assert type(aggregator) is reference.Aggregator
