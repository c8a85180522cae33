"""Ways in which projects alter upstream's aggregator: each takes one and changes it in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

Alteration = Callable[[Any], object]


def override(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """Give a module a class of its own, in which methods are others; these get the old class's first."""
    base: Any = type(module)
    namespace = {
        name: functools.partialmethod(_altered, function, getattr(base, name))
        for name, function in methods.items()
    }
    module.__class__ = type(f"Altered{base.__name__}", (base,), namespace)


def _altered(self: Any, function: Callable[..., Any], own: Callable[..., Any], *arguments: Any) -> Any:
    return function(self, own, *arguments)


def classes_of(a: Any) -> Any:
    return a.layers[0].attention


def first_block(a: Any) -> Any:
    return a.layers[0].swin_block.block_1


def second_block(a: Any) -> Any:
    return a.layers[0].swin_block.block_2


def after(scale: Callable[[Tensor], Tensor]) -> Alteration:
    """Alter the answer."""
    return lambda a: override(a, aggregate=lambda self, own, *args: scale(own(self, *args)))


def feature_map(function: Callable[[Tensor], Tensor]) -> Alteration:
    return lambda a: setattr(classes_of(a).attention.attention, "feature_map", function)


def tokens(function: Callable[[Any, Tensor, Tensor], Tensor]) -> Alteration:
    """Alter what the class layer does with tokens."""
    return lambda a: override(classes_of(a), tokens=lambda self, own, x, g: function(self, x, g))


def in_chunks(self: Any, own: Any, image: Tensor, text: Tensor, maps: Any) -> Tensor:
    if text.shape[1] <= self.pad_len:
        return own(self, image, text, maps)
    parts = [own(self, image, part, maps) for part in text.split(self.pad_len, dim=1)]
    return torch.cat(parts, dim=1)


def resized(self: Any, own: Any, image: Tensor, text: Tensor, maps: Any) -> Tensor:
    side = 8
    small = [
        F.interpolate(x, (k * side, k * side)) for x, k in zip((image, *maps), (1, 1, 2, 4), strict=True)
    ]
    logits = own(self, small[0], text, small[1:])
    return F.interpolate(logits, (4 * image.shape[2], 4 * image.shape[3]))


class Lora(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, base: nn.Linear, scale: float = 1.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        for layer in (self.lora_A, self.lora_B):
            nn.init.constant_(layer.weight, 0.1)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def gate(a: Any, value: float) -> None:
    block = first_block(a)
    block.gate = nn.Parameter(torch.full((), value))
    override(block, finish=lambda self, own, x: own(self, x) + self.gate * x)


def buffer(a: Any, value: float) -> None:
    a.register_buffer("gain", torch.full((), value))
    override(a, correlation=lambda self, own, *args: own(self, *args) * self.gain)


def set_eps(a: Any, pick: Callable[[Any], Any], eps: float) -> None:
    pick(a).eps = eps


def without_bias(layer: nn.Linear | nn.Conv2d) -> None:
    layer.bias = None


def warmed(layer: Any) -> None:
    """Let a layer estimate its spectral norm, which it does in training only."""
    layer.train()(torch.zeros(1, layer.in_features))
    layer.eval()


def counted(self: Any, own: Any, *arguments: Any) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    answer: Tensor = own(self, *arguments)
    return answer


def extra_skip(self: Any, own: Any, x: Tensor, *guidance: Tensor) -> Tensor:
    return own(self, x, *guidance) + 0.1 * x


# Same maths: the engine must take them as a whole.
EQUAL: dict[str, Alteration] = {
    "nothing": lambda a: None,
    "unused head": lambda a: setattr(a, "auxiliary", nn.Conv2d(16, 3, 1)),
    "unused parameter": lambda a: setattr(a, "temperature", nn.Parameter(torch.ones(3))),
    "weight norm": lambda a: weight_norm(classes_of(a).MLP[0]),
    "weight norm, parametrised": lambda a: parametrizations.weight_norm(first_block(a).mlp.fc1).eval(),
    "spectral norm": lambda a: warmed(spectral_norm(first_block(a).attn.q, n_power_iterations=20)),
    "spectral norm, parametrised": lambda a: warmed(
        parametrizations.spectral_norm(classes_of(a).attention.k)
    ),
    "pruned": lambda a: prune.random_unstructured(second_block(a).attn.v, "weight", 0.4),
    "linear layers without bias": lambda a: [
        without_bias(x) for x in (classes_of(a).attention.q, first_block(a).attn.v)
    ],
    "head without bias": lambda a: without_bias(a.head),
    "dropout in evaluation": lambda a: setattr(first_block(a).attn, "attn_drop", nn.Dropout(0.5).eval()),
    "drop path in evaluation": lambda a: setattr(second_block(a), "drop_path", DropPath(0.5).eval()),
    "guidance norm's eps": lambda a: set_eps(a, lambda a: a.layers[0].swin_block.guidance_norm, 1e-2),
    "group norm's eps": lambda a: set_eps(a, lambda a: a.decoder1.conv.double_conv[1], 1e-2),
    "linear attention's eps": lambda a: set_eps(a, lambda a: classes_of(a).attention.attention, 1.0),
    "attention scale": lambda a: setattr(first_block(a).attn, "scale", 0.5),
    "other group norm": lambda a: a.decoder1.conv.double_conv.__setitem__(1, nn.GroupNorm(4, 32)),
    "guidance projected by GELU": lambda a: a.guidance_projection.__setitem__(1, nn.GELU()),
    "pad_len of the class layers only": lambda a: setattr(a, "pad_len", 0),
    "widened inside": lambda a: override(
        a, conv_decoder=lambda self, own, x, g: own(self, x.contiguous(), g)
    ),
}

# Other maths, or code that the engine cannot read.
OTHER: dict[str, Alteration] = {
    "guidance tiled by class": lambda a: override(
        a.layers[0].swin_block, spread=lambda self, own, g, T: repeat(g, "b c h w -> (t b) (h w) c", t=T)
    ),
    "depends on the batch": after(lambda x: x - x.mean(dim=0, keepdim=True) * (len(x) > 1)),
    "none dropped": lambda a: override(
        a, forward=lambda self, own, i, t, m: self.aggregate(self.correlation(i, t), t, m)
    ),
    "in chunks of pad_len": lambda a: override(a, forward=in_chunks),
    "another score": lambda a: override(a, score=lambda self, own, corr: corr.mean(dim=(1, 3, 4))),
    "lowest scores": lambda a: override(a, score=lambda self, own, corr: -own(self, corr)),
    "another fill value": lambda a: override(
        a, fill_dropped=lambda self, own, *args: own(self, *args).clamp_min(-50.0)
    ),
    "many classes attended otherwise": tokens(
        lambda self, x, g: type(self).__bases__[0].tokens(self, x if x.shape[1] < 10 else 0.9 * x, g)
    ),
    "many classes otherwise": after(lambda x: x * (1.0 if x.shape[1] < 11 else 1.5)),
    "background apart": after(lambda x: torch.cat([x[:, :1] + (x.shape[1] > 2), x[:, 1:]], dim=1)),
    "single class apart": after(lambda x: x * (2.0 if x.shape[1] == 1 else 1.0)),
    "relu feature map": feature_map(lambda x: F.relu(x) + 1),
    "softplus feature map": feature_map(F.softplus),
    "sigmoid feature map": feature_map(torch.sigmoid),
    "class MLP with GELU": lambda a: classes_of(a).MLP.__setitem__(1, nn.GELU()),
    "class MLP with LeakyReLU": lambda a: classes_of(a).MLP.__setitem__(1, nn.LeakyReLU(0.01)),
    "residual 0.9": tokens(
        lambda self, x, g: 0.9 * x + self.MLP(self.norm2(x + self.attention(self.norm1(x), g)))
    ),
    "no class attention": tokens(lambda self, x, g: x + self.MLP(self.norm2(x))),
    "post-norm": tokens(lambda self, x, g: self.norm1(x + self.attention(x, g))),
    "extra skip in a class layer": lambda a: override(classes_of(a), forward=extra_skip),
    "extra skip in a layer": lambda a: override(a.layers[0], forward=extra_skip),
    "mask of -5": lambda a: second_block(a).attn_mask.mul_(0.05),
    "no mask": lambda a: second_block(a).attn_mask.zero_(),
    "QuickGELU": lambda a: setattr(first_block(a).mlp, "act", QuickGELU()),
    "GELU by tanh": lambda a: setattr(first_block(a).mlp, "act", nn.GELU("tanh")),
    "correlation x 1.01": lambda a: override(a, correlation=lambda self, own, *args: 1.01 * own(self, *args)),
    "correlation squared": lambda a: override(
        a, correlation=lambda self, own, *args: own(self, *args).square()
    ),
    "features not normalised": lambda a: override(
        a, correlation=lambda self, own, i, t: torch.einsum("bchw,btpc->bpthw", i, F.normalize(t, dim=-1))
    ),
    "block norm's eps": lambda a: set_eps(a, lambda a: first_block(a).norm1, 1e-6),
    "class norm's eps": lambda a: set_eps(a, lambda a: classes_of(a).norm2, 1e-3),
    "norm without weight": lambda a: setattr(
        first_block(a), "norm2", nn.LayerNorm(32, elementwise_affine=False)
    ),
    "gate at zero": lambda a: gate(a, 0.0),
    "gate": lambda a: gate(a, 0.3),
    "buffer of one": lambda a: buffer(a, 1.0),
    "guidance clamped": lambda a: override(
        a, guidance=lambda self, own, maps: own(self, [x.clamp(-3, 3) for x in maps])
    ),
    "guidance clamped far out": lambda a: override(
        a, guidance=lambda self, own, maps: own(self, [x.clamp(-9, 9) for x in maps])
    ),
    "LoRA in the class attention": lambda a: setattr(
        classes_of(a).attention, "q", Lora(classes_of(a).attention.q)
    ),
    "LoRA in a block": lambda a: setattr(first_block(a).mlp, "fc1", Lora(first_block(a).mlp.fc1)),
    "hook on a block": lambda a: first_block(a).register_forward_hook(lambda m, i, out: 1.1 * out),
    "pre-hook on the head": lambda a: a.head.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "hook on a projection": lambda a: a.text_guidance_projection.register_forward_hook(
        lambda m, i, out: -out
    ),
    "forward of its own": lambda a: setattr(classes_of(a).attention, "forward", lambda x, g: 0.5 * x),
    "forward of a layer": lambda a: setattr(first_block(a).attn.proj, "forward", lambda x: 0.5 * x),
    "adapter in a block": lambda a: override(
        first_block(a), finish=lambda self, own, x: own(self, x) + self.attn.proj(F.relu(x))
    ),
    "text not normalised": lambda a: override(
        a, text_guidance=lambda self, own, t: self.text_guidance_projection(t.mean(dim=-2))
    ),
    "text normalised by prompt": lambda a: override(
        a, text_guidance=lambda self, own, t: own(self, F.normalize(t, dim=-1))
    ),
    "first prompt only": lambda a: override(a, text_guidance=lambda self, own, t: own(self, t[:, :, :1])),
    "sigmoid": after(torch.sigmoid),
    "doubled": after(lambda x: 2 * x),
    "centred over classes": after(lambda x: x - x.mean(dim=1, keepdim=True)),
    "layers run twice": lambda a: override(
        a, run_layers=lambda self, own, x, g, t: own(self, own(self, x, g, t), g, t)
    ),
    "skip from the embedding": lambda a: override(
        a, run_layers=lambda self, own, x, g, t: own(self, x, g, t) + 0.5 * x
    ),
    "parallel blocks": lambda a: override(
        a.layers[0], forward=lambda self, own, x, g, t: self.swin_block(x, g) + self.attention(x, t)
    ),
    "classes first": lambda a: override(
        a.layers[0], forward=lambda self, own, x, g, t: self.swin_block(self.attention(x, t), g)
    ),
    "decoder guidance halved": lambda a: override(
        a, conv_decoder=lambda self, own, x, g: own(self, x, [0.5 * y for y in g])
    ),
    "decoder without guidance": lambda a: override(
        a, conv_decoder=lambda self, own, x, g: own(self, x, [0 * y for y in g])
    ),
    "max pooling": lambda a: setattr(classes_of(a), "pool", nn.MaxPool2d(2)),
    "overlapping pooling": lambda a: setattr(classes_of(a), "pool", nn.AvgPool2d(3, 2, 1)),
    "no shift": lambda a: setattr(second_block(a), "shift_size", 0),
    "softmax temperature": lambda a: setattr(
        first_block(a).attn, "softmax", nn.Sequential(nn.Threshold(-1, -1), nn.Softmax(dim=-1))
    ),
    "softmax over queries": lambda a: setattr(first_block(a).attn, "softmax", nn.Softmax(dim=-2)),
    "LeakyReLU in the decoder": lambda a: a.decoder1.conv.double_conv.__setitem__(2, nn.LeakyReLU(0.1)),
    "batch norm in the decoder": lambda a: a.decoder2.conv.double_conv.__setitem__(
        4, nn.BatchNorm2d(16).eval()
    ),
    "bias in the decoder": lambda a: a.decoder2.conv.double_conv.__setitem__(
        0, nn.Conv2d(32, 16, 3, padding=1)
    ),
    "dilated decoder": lambda a: a.decoder1.conv.double_conv.__setitem__(
        3, nn.Conv2d(32, 32, 3, padding=2, dilation=2, bias=False)
    ),
    "circular embedding": lambda a: setattr(a.conv1, "padding_mode", "circular"),
    "embedding of 5x5": lambda a: setattr(a, "conv1", nn.Conv2d(2, 32, 5, padding=2)),
    "two classes attend less": tokens(
        lambda self, x, g: x + self.attention(self.norm1(x * (x.shape[1] > 2)), g)
    ),
    "counts its calls": lambda a: override(a, aggregate=counted),
}
