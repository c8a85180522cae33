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


class Foreign(nn.Module):
    """A module's parts and parameters without some attributes, and with its computation."""

    def __init__(self, module: nn.Module, hidden: tuple[str, ...]) -> None:
        super().__init__()
        for name, value in vars(module).items():
            if name not in hidden:
                self.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
        for name in hidden:
            self._parameters.pop(name, None)
        self.__dict__["original"] = module

    def forward(self, *arguments: Any) -> Any:
        return self.original.forward(*arguments)


def foreign_aggregator(aggregator: reference.Aggregator) -> Foreign:
    """The same in other classes that have upstream's attributes alone: v1 knows no padding, v2 does."""
    hidden: tuple[str, ...] = ("nominal_window", "_max_classes")
    if not aggregator.pad_len:
        hidden += ("pad_len", "padding_tokens", "padding_guidance")
    outer = Foreign(aggregator, hidden)
    outer.layers = nn.ModuleList()
    for layer in aggregator.layers:
        wrapper = Foreign(layer, hidden)
        wrapper.swin_block = Foreign(layer.swin_block, hidden)
        wrapper.swin_block.block_1 = Foreign(layer.swin_block.block_1, hidden)
        wrapper.swin_block.block_2 = Foreign(layer.swin_block.block_2, hidden)
        wrapper.attention = Foreign(layer.attention, hidden)
        outer.layers.append(wrapper)
    return outer


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

    def counted(self: Engine, *arguments: Any) -> Tensor:
        calls.append(self)
        return logits(self, *arguments)

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
    aggregator: nn.Module = make_aggregator(**changes)
    model = Predictor(foreign_aggregator(aggregator) if foreign else aggregator)  # type: ignore[arg-type]
    batch = inputs(**changes)
    keys = list(model.state_dict())
    own = model(*batch)
    acceleration = accelerate(model)
    assert list(acceleration.engines) == ["head.transformer"]
    assert list(model.state_dict()) == keys
    engine_calls.clear()
    torch.testing.assert_close(model(*batch), own, rtol=0, atol=1e-5)
    assert engine_calls == list(acceleration.engines.values())
    acceleration.restore()
    assert torch.equal(model(*batch), own)
    acceleration.restore()  # nothing left to do
    assert len(engine_calls) == 1
    assert "forward" not in vars(model.head["transformer"])


@torch.no_grad()
def test_an_aggregator_by_itself() -> None:
    aggregator = make_aggregator()
    own = aggregator(*inputs())
    with accelerate(aggregator) as acceleration:
        assert list(acceleration.engines) == [""]
        accelerated = aggregator(*inputs())
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
        for aggregator, expected in zip((first, second), own, strict=True):
            torch.testing.assert_close(aggregator(*inputs()), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("foreign", [False, True], ids=["reference", "foreign"])
def test_parameters_are_shared(foreign: bool) -> None:
    plain = make_aggregator(pad_len=9)
    aggregator = foreign_aggregator(plain) if foreign else plain
    accelerate(aggregator)
    before = aggregator(*inputs())
    for name in ("conv1.weight", "layers.1.attention.padding_tokens", "decoder2.conv.double_conv.1.weight"):
        aggregator.get_parameter(name).mul_(-1.1)
        after = aggregator(*inputs())
        expected = reference.Aggregator.forward(plain, *inputs())
        assert not torch.allclose(after, before, atol=1e-3), name
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)
        before = after


def test_training_and_gradients_run_the_models_own_code(engine_calls: list[Engine]) -> None:
    aggregator = make_aggregator()
    acceleration = accelerate(aggregator)
    engine_calls.clear()
    own = reference.Aggregator.forward(aggregator, *inputs())
    assert torch.equal(aggregator(*inputs()), own)
    aggregator(*inputs()).sum().backward()
    assert aggregator.conv1.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(aggregator.train()(*inputs()), own)
    assert not engine_calls
    with torch.inference_mode():
        aggregator.eval()(*inputs())
    assert engine_calls == list(acceleration.engines.values())


@torch.no_grad()
def test_a_copy_has_an_engine_of_its_own() -> None:
    aggregator = make_aggregator()
    accelerate(aggregator)
    before = aggregator(*inputs())
    file = io.BytesIO()
    torch.save(aggregator, file)
    file.seek(0)
    for duplicate in (copy.deepcopy(aggregator), torch.load(file, weights_only=False)):
        duplicate.head.weight.zero_()
        assert torch.equal(duplicate(*inputs()), duplicate.head.bias.expand_as(before))
        assert torch.equal(aggregator(*inputs()), before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    aggregator = make_aggregator(pad_len=9).to(dtype)
    image, text, guidance = inputs()
    batch = (image.to(dtype), text.to(dtype), [x.to(dtype) for x in guidance if x is not None])
    own = aggregator(*batch)
    accelerate(aggregator)
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


class Doubled(reference.Aggregator):
    def forward(self, *arguments: Any) -> Tensor:
        return 2 * super().forward(*arguments)


class Demanding(reference.Aggregator):
    def forward(self, *arguments: Any, temperature: float) -> Tensor:
        return super().forward(*arguments) / temperature


def refused(change: str) -> nn.Module:
    """Something like an aggregator that is none of upstream's."""
    aggregator: nn.Module = make_aggregator()
    if change == "extra parameter":
        aggregator.temperature = nn.Parameter(torch.ones(3))
    elif change == "missing parameter":
        aggregator.head = nn.Conv2d(16, 1, 3, padding=1, bias=False)
    elif change == "other shape":
        aggregator.layers[1].attention.MLP = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    elif change == "other kernel":
        aggregator.conv1 = nn.Conv2d(2, 32, 5, padding=2)
    elif change == "other activation":
        aggregator.layers[0].attention.MLP[1] = nn.GELU()
    elif change == "no norm":
        aggregator.layers[1].swin_block.guidance_norm.forward = torch.tanh
    elif change == "no layers":
        aggregator.layers = nn.ModuleList()
    elif change == "other layers":
        aggregator.layers = nn.ModuleList([nn.Linear(3, 3)])
    elif change == "other answer":
        aggregator = Doubled(**ARGUMENTS).eval()
    elif change == "other arguments":
        aggregator = Demanding(**ARGUMENTS).eval()
    return aggregator


REFUSED = {
    "extra parameter": r"temperature is \(3,\), expected missing",
    "missing parameter": r"head.bias is missing, expected \(1,\)",
    "other shape": r"layers.1.attention.MLP.0.bias is \(64,\), expected \(128,\)",
    "other kernel": r"conv1.weight is \(32, 2, 5, 5\), expected \(32, 2, 7, 7\)",
    "other activation": "computes something else",
    "no norm": "computes something else",
    "no layers": "is not built like upstream's Aggregator",
    "other layers": "is not built like upstream's Aggregator: 'Linear' object has no attribute 'swin_block'",
    "other answer": "computes something else",
    "other arguments": "does not run on upstream's arguments: .*'temperature'",
}


@torch.no_grad()
@pytest.mark.parametrize("change", REFUSED)
def test_other_models_are_refused_with_the_reason(change: str) -> None:
    good = make_aggregator()
    model = nn.ModuleDict({"good": good, "bad": refused(change)})
    own = good(*inputs())
    with pytest.raises(ValueError, match=f"^model: bad .*{REFUSED[change]}"):
        accelerate(model)
    assert torch.equal(good(*inputs()), own)
    assert "forward" not in {**vars(good), **vars(model["bad"])}


def test_verification_can_be_left_out() -> None:
    accelerate(refused("other answer"), verify=False)
    with pytest.raises(ValueError, match="temperature"):
        accelerate(refused("extra parameter"), verify=False)


def test_no_aggregator() -> None:
    with pytest.raises(ValueError, match="model: no aggregator was found in this Sequential"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))


def test_models_that_have_an_engine_already() -> None:
    with pytest.raises(ValueError, match=r"model: sem_seg_head.predictor.transformer has an engine already"):
        accelerate(tiny_model())
    aggregator = make_aggregator()
    acceleration = accelerate(aggregator)
    with pytest.raises(ValueError, match="model: it has a forward of its own already"):
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
    assert "forward" not in vars(aggregator)
