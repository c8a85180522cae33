"""Changes of an aggregator after `accelerate` and some calls; each function makes one, in place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from support import upstream_layers, upstream_like
from support.alterations import (
    Alteration,
    Lora,
    buffer,
    classes_of,
    feature_map,
    first_block,
    gate,
    override,
    second_block,
    set_eps,
    warmed,
)  # fmt: skip


def patch_class(a: Any) -> None:
    """Replace a method of an aggregator's class, which no other aggregator has."""
    *_, kind = (kind for kind in type(a).__mro__ if kind.__name__ == "Patched")  # not the engine's, before it
    kind.conv_decoder = lambda self, x, g, own=kind.conv_decoder: -own(self, x, g)  # type: ignore[attr-defined]


def replace_weights(a: Any) -> None:
    state = {name: 1.1 * x if x.is_floating_point() else x for name, x in a.state_dict().items()}
    state = {name: a.state_dict()[name] if name.endswith("attn_mask") else x for name, x in state.items()}
    a.load_state_dict(state, assign=True)


def average(a: Any) -> None:
    for parameter in a.parameters():
        parameter.data.mul_(0.9)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Adapted(nn.Module):
    """A module inside of another, as adapters wrap them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any) -> Tensor:
        answer: Tensor = 1.1 * self.base(*args)
        return answer


def by_settings(a: Any) -> None:
    a.settings = SimpleNamespace(cost=SimpleNamespace(gain=1.0), layers=[{"scale": 1.0}, torch.ones(())])
    override(
        a,
        correlation=lambda self, own, *args: own(self, *args) * self.settings.cost.gain,
        aggregate=lambda self, own, *args: (
            own(self, *args) * self.settings.layers[0]["scale"] * self.settings.layers[1].to(args[0].dtype)
        ),
    )


def by_closure(a: Any) -> None:
    gain = 1.0

    def correlation(self: Any, own: Any, *args: Any) -> Tensor:
        answer: Tensor = own(self, *args) * gain
        return answer

    def set_gain(value: float) -> None:
        nonlocal gain
        gain = value

    override(a, correlation=correlation)
    a.set_gain = set_gain


class Offset:
    value = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.value


def with_a_callable(a: Any) -> None:
    a.offset = Offset()
    override(a, aggregate=lambda self, own, *args: self.offset(own(self, *args)))


def halved(img_feats: Tensor, text_feats: Tensor) -> Tensor:
    return torch.einsum("bchw,btpc->bpthw", img_feats, text_feats)


LATER: dict[str, Alteration] = {
    "hook": lambda a: first_block(a).mlp.register_forward_hook(lambda m, i, out: 1.1 * out),
    "pre-hook": lambda a: classes_of(a).register_forward_pre_hook(lambda m, i: (1.1 * i[0], *i[1:])),
    "LoRA": lambda a: setattr(classes_of(a).attention, "v", Lora(classes_of(a).attention.v)),
    "activation": lambda a: setattr(first_block(a).mlp, "act", nn.SiLU()),
    "mask": lambda a: second_block(a).attn_mask.mul_(0.05),
    "mask replaced": lambda a: setattr(second_block(a), "attn_mask", second_block(a).attn_mask * 0.05),
    "pool": lambda a: setattr(classes_of(a), "pool", nn.AvgPool2d(2)),
    "kernel size": lambda a: classes_of(a).pool.__dict__.update(kernel_size=(2, 2), stride=(2, 2)),
    "pad_len": lambda a: [setattr(x, "pad_len", 6) for x in (a, classes_of(a))],
    "heads": lambda a: setattr(first_block(a).attn, "num_heads", 4),
    "shift": lambda a: setattr(second_block(a), "shift_size", 1),
    "group norm's eps": lambda a: set_eps(a, lambda a: a.decoder2.conv.double_conv[1], 1e-1),
    "block norm's eps": lambda a: set_eps(a, lambda a: first_block(a).norm2, 1e-1),
    "linear attention's eps": lambda a: set_eps(a, lambda a: classes_of(a).attention.attention, 1.0),
    "feature map": feature_map(torch.sigmoid),
    "weights written": lambda a: [parameter.mul_(0.9) for parameter in a.parameters()],
    "weights written through .data": average,
    "one weight written through .data": lambda a: a.head.weight.data.mul_(-1),
    "weights put in through .data": lambda a: setattr(a.conv1.weight, "data", a.conv1.weight.data * 2),
    "weights replaced": replace_weights,
    "a weight replaced": lambda a: setattr(a.head, "weight", nn.Parameter(-a.head.weight)),
    "a module replaced": lambda a: setattr(a, "head", nn.Conv2d(16, 1, 3, padding=1)),
    "a bias removed": lambda a: setattr(a.head, "bias", None),
    "another class": lambda a: override(first_block(a), finish=lambda self, own, x: own(self, x) + x),
    "a method of the class": lambda a: patch_class(a),
    "forward": lambda a: setattr(classes_of(a).attention, "forward", lambda x, g: 0.5 * x),
    "layers": lambda a: a.layers.append(a.layers[0]),
    "pruned": lambda a: prune.l1_unstructured(first_block(a).mlp.fc1, "weight", 0.5),
    "weight norm": lambda a: [weight_norm(a.head), a.head.weight_g.mul_(2)],
    "weight norm, parametrised": lambda a: [
        parametrizations.weight_norm(a.head),
        a.head.parametrizations.weight.original0.mul_(2),
    ],
    "spectral norm": lambda a: warmed(spectral_norm(first_block(a).mlp.fc1, n_power_iterations=20)),
    "another parametrisation": lambda a: parametrize.register_parametrization(a.head, "weight", Doubled()),
    "an adapter around a block": lambda a: setattr(
        a.layers[0].swin_block, "block_2", Adapted(second_block(a))
    ),
    "an adapter around a layer": lambda a: a.layers.__setitem__(0, Adapted(a.layers[0])),
    "an adapter around a projection": lambda a: setattr(
        a, "text_guidance_projection", Adapted(a.text_guidance_projection)
    ),
    "a projection's hook": lambda a: a.guidance_projection.register_forward_hook(
        lambda m, i, out: out.flip(1)
    ),
    "a setting": lambda a: setattr(a.settings.cost, "gain", 2.0),
    "a setting in a list": lambda a: a.settings.layers[0].update(scale=2.0),
    "a tensor in a list": lambda a: a.settings.layers[1].fill_(2.0),
    "a variable of a closure": lambda a: a.set_gain(2.0),
    "a function of the module": lambda a: setattr(upstream_like, "cosines", halved),
    "a method of torch's class": lambda a: setattr(
        nn.LayerNorm, "forward", lambda self, x: 2 * F.layer_norm(x, x.shape[-1:], self.weight, self.bias)
    ),
    "torch's function": lambda a: setattr(F, "interpolate", lambda x, **options: 2 * x),
    "a callable's class": lambda a: setattr(Offset, "__call__", lambda self, x: x + 1),
    "a callable's value": lambda a: setattr(a.offset, "value", 1.0),
    "a function's code": lambda a: setattr(upstream_like.cosines, "__code__", halved.__code__),
    "the module's elu": lambda a: setattr(
        upstream_layers, "F", SimpleNamespace(**{**vars(F), "elu": torch.relu})
    ),
    "double": lambda a: a.double(),
    "a filled buffer": lambda a: a.gain.fill_(1.5),
    "an opened gate": lambda a: first_block(a).gate.fill_(0.5),
}

# What was done before.
BEFORE: dict[str, Alteration] = {
    "a setting": by_settings,
    "a setting in a list": by_settings,
    "a tensor in a list": by_settings,
    "a variable of a closure": by_closure,
    "a callable's class": with_a_callable,
    "a callable's value": with_a_callable,
    "a method of the class": lambda a: setattr(a, "__class__", type("Patched", (type(a),), {})),
    "a filled buffer": lambda a: buffer(a, 1.0),
    "an opened gate": lambda a: gate(a, 0.0),
}
