"""Models that `accelerate` refuses, or runs as they are: never a crash from inside."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm

from catseg_fast import accelerate, reference
from catseg_fast.acceleration import whole
from catseg_fast.errors import InputError, InputTypeError
from support.alterations import classes_of, first_block, override
from support.upstream_like import Aggregator, make_aggregator, make_inputs


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Aggregator().eval()


def half_loaded() -> nn.Module:
    aggregator = make_aggregator()
    aggregator.layers[0].attention.MLP[0] = nn.Linear(32, 128, device="meta")
    aggregator.layers[0].swin_block.block_1.mlp.to("meta")
    aggregator.decoder1.to("meta")
    return aggregator


def traced() -> nn.Module:
    return torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))


def compiled() -> nn.Module:
    return torch.compile(make_aggregator())  # type: ignore[return-value]


def compiled_in_place() -> nn.Module:
    aggregator = make_aggregator()
    aggregator.compile()
    return aggregator


def inside_a_compiled_model() -> nn.Module:
    return torch.compile(nn.Sequential(make_aggregator()))  # type: ignore[return-value]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no aggregator": (lambda: nn.Linear(2, 2), "no aggregator was found in this Linear$"),
    "meta device": (on_meta, r".*is on the meta device; load the weights first"),
    "half loaded": (half_loaded, r".*layers.0.swin_block.block_1.mlp.fc1.weight is on the meta device"),
    "traced": (traced, "it is traced or scripted by torch.jit"),
    "compiled": (compiled, "it is compiled already; accelerate first, then compile"),
    "compiled in place": (compiled_in_place, "it is compiled already; accelerate first, then compile"),
    "in a compiled model": (inside_a_compiled_model, "_orig_mod.0 is compiled already"),
    "forward of its own": (
        lambda: setattr(a := make_aggregator(), "forward", lambda *x: x) or a,  # type: ignore[func-returns-value]
        "it has a forward of its own, which would be ignored",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    types = list(map(type, model.modules()))
    with pytest.raises(InputError, match=f"^model: {message}"):
        accelerate(model)
    assert list(map(type, model.modules())) == types


def test_no_module() -> None:
    with pytest.raises(InputTypeError, match=r"model: expected a torch.nn.Module, got function"):
        accelerate(test_no_module)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_layers_keep_their_code() -> None:
    aggregator = torch.ao.quantization.quantize_dynamic(make_aggregator(), {nn.Linear})
    own = copy.deepcopy(aggregator)
    with pytest.warns(
        RuntimeWarning,
        match=r"swin_block.block_1.attn.q is a torch.ao.nn.quantized.dynamic.*Linear, expected Linear",
    ):
        acceleration = accelerate(aggregator)
    assert [part.kind for part in acceleration.parts if part.refusal is None] == ["decoder"]
    for _ in range(2):
        torch.testing.assert_close(aggregator(*make_inputs()), own(*make_inputs()), rtol=0, atol=5e-5)


@torch.no_grad()
def test_a_compiled_layer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)(*make_inputs())
    aggregator.layers[0].attention = torch.compile(aggregator.layers[0].attention, backend="eager")
    acceleration = accelerate(aggregator)
    assert list(acceleration.engines) == [""]
    for _ in range(2):
        torch.testing.assert_close(aggregator(*make_inputs()), own, rtol=0, atol=5e-5)


@torch.no_grad()
def test_compiling_after_accelerating() -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)(*make_inputs())
    accelerate(aggregator)
    compiled = torch.compile(aggregator, backend="eager")
    warnings.simplefilter("error", RuntimeWarning)
    for _ in range(2):
        torch.testing.assert_close(compiled(*make_inputs()), own, rtol=0, atol=5e-5)


@torch.no_grad()
def test_weights_that_are_no_numbers() -> None:
    aggregator = make_aggregator()
    with torch.no_grad():
        aggregator.layers[0].attention.MLP[2].bias[3] = float("nan")
    own = copy.deepcopy(aggregator)(*make_inputs())
    accelerate(aggregator)
    for _ in range(2):
        assert torch.equal(aggregator(*make_inputs()).isnan(), own.isnan())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_has_computed_with_its_gradient() -> None:
    aggregator = make_aggregator()
    weight_norm(classes_of(aggregator).MLP[0])
    own = aggregator(*make_inputs())
    assert classes_of(aggregator).MLP[0].weight.grad_fn is not None
    assert list(accelerate(aggregator).engines) == [""]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(aggregator(*make_inputs()), own, rtol=0, atol=5e-5)


@torch.no_grad()
def test_dropout_keeps_its_noise() -> None:
    aggregator = make_aggregator()
    first_block(aggregator).attn.proj_drop = nn.Dropout(0.3)
    acceleration = accelerate(aggregator)
    with pytest.warns(
        RuntimeWarning, match=r"layers.0.swin_block.block_1.attn.proj_drop is in training mode"
    ):
        answers = [aggregator(*make_inputs()) for _ in range(3)]
    assert not torch.equal(answers[1], answers[2])
    aggregator.eval()
    answers = [aggregator(*make_inputs()) for _ in range(3)]
    assert torch.equal(answers[1], answers[2])
    assert acceleration.explain().startswith("the model (aggregator): the engine; 1 kind of input compared")


@torch.no_grad()
def test_a_model_accelerated_in_training_mode() -> None:
    aggregator = make_aggregator().train()
    own = copy.deepcopy(aggregator).eval()(*make_inputs())
    acceleration = accelerate(aggregator)
    assert list(acceleration.engines) == [""]
    aggregator.eval()
    for _ in range(2):
        torch.testing.assert_close(aggregator(*make_inputs()), own, rtol=0, atol=5e-5)
    assert acceleration.parts[0].verdicts


@torch.no_grad()
def test_hooks_on_the_aggregator_are_called() -> None:
    aggregator = make_aggregator()
    accelerate(aggregator)
    expected = [2 * aggregator(*make_inputs()) for _ in range(2)][1]
    aggregator.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert torch.equal(aggregator(*make_inputs()), expected)


@torch.no_grad()
def test_layouts_do_not_matter() -> None:
    aggregator = make_aggregator().to(memory_format=torch.channels_last)
    image, text, guidance = make_inputs(7, 2)
    own = copy.deepcopy(aggregator)(image, text, guidance)
    accelerate(aggregator)
    other = (
        image.to(memory_format=torch.channels_last),
        text.flip(1).flip(1),
        [x.mT.contiguous().mT for x in guidance],
    )
    for _ in range(2):
        torch.testing.assert_close(aggregator(*other), own, rtol=0, atol=5e-5)


@torch.no_grad()
def test_more_classes_than_the_models_own_code_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator, seen = make_aggregator(pad_len=0), []

    def watch(self: Any, own: Any, image: Any, text: Any, guidance: Any) -> Any:
        seen.append(text.shape[1])
        return own(self, image, text, guidance)

    override(aggregator, forward=watch)
    own = copy.deepcopy(aggregator)(*make_inputs(9, 2))
    accelerate(aggregator)
    seen.clear()
    monkeypatch.setattr(whole, "free_bytes", lambda device: 2 * 2 * 16 * 32 * 64 * 4 + 1)  # two classes
    for _ in range(2):
        torch.testing.assert_close(aggregator(*make_inputs(9, 2)), own, rtol=0, atol=5e-5)
    assert seen == [2]


@torch.no_grad()
def test_other_arguments_go_to_the_models_own_code() -> None:
    aggregator = make_aggregator()
    override(aggregator, forward=lambda self, own, i, t, g, scale=1.0: own(self, i, t, g) * scale)
    image, text, guidance = make_inputs()
    own = aggregator(image, text, guidance)
    acceleration = accelerate(aggregator)
    assert torch.equal(aggregator(image, text, guidance, 2.0), 2 * own)
    assert acceleration.parts


@torch.no_grad()
def test_keywords() -> None:
    for kind in (make_aggregator(), reference.Aggregator(**RESEMBLING).eval()):
        image, text, guidance = make_inputs()
        own = kind(image, text, guidance)
        accelerate(kind)
        for _ in range(2):
            answer = kind(image, appearance_guidance=guidance, text_feats=text)
            torch.testing.assert_close(answer, own, rtol=0, atol=5e-5)
        with pytest.raises(TypeError, match="unexpected keyword argument 'maps'"):
            kind(image, text, maps=guidance)


RESEMBLING: dict[str, Any] = {
    "text_guidance_dim": 24, "text_guidance_proj_dim": 16, "appearance_guidance_dim": 20,
    "appearance_guidance_proj_dim": 16, "decoder_dims": (32, 16), "decoder_guidance_dims": (12, 10),
    "decoder_guidance_proj_dims": (8, 4), "num_layers": 1, "nheads": 2, "hidden_dim": 32,
    "pooling_size": (1, 1), "feature_resolution": (8, 8), "window_size": 4, "prompt_channel": 2,
}  # fmt: skip
