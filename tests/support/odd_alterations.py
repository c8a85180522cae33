"""Alterations whose effect depends on values, on the state, or on the numbers of a call; and further ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.alterations import Alteration, after, classes_of, first_block, override, second_block


def biased(self: Any, own: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Window attention with a bias by relative position."""
    bias = self.bias if mask is None else mask + self.bias
    answer: Tensor = own(self, x, bias.view(-1, *self.bias.shape[-2:]))
    return answer


def with_position_bias(a: Any) -> None:
    attention = first_block(a).attn
    attention.bias = nn.Parameter(torch.zeros(1, 16, 16))
    override(attention, forward=biased)


def swapped(self: Any, own: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    self.q, self.k = self.k, self.q
    answer: Tensor = own(self, x, mask)
    self.q, self.k = self.k, self.q
    return answer


def cost(function: Callable[[Tensor], Tensor]) -> Alteration:
    """Alter the cost volume."""
    return lambda a: override(a, correlation=lambda self, own, *args: function(own(self, *args)))


def image(function: Callable[[Tensor], Tensor]) -> Alteration:
    """Alter the image features."""
    return lambda a: override(a, forward=lambda self, own, i, t, m: own(self, function(i), t, m))


def maps(function: Callable[[Tensor], Tensor]) -> Alteration:
    """Alter the guidance."""
    return lambda a: override(a, guidance=lambda self, own, m: own(self, [function(x) for x in m]))


def enlarge(**options: Any) -> Alteration:
    """Alter how pooled maps get their size back."""
    return lambda a: override(
        classes_of(a), enlarge=lambda self, own, x, size: F.interpolate(x, size, **options)
    )


def keeps_its_first_text(self: Any, own: Any, text: Tensor) -> Tensor:
    if not hasattr(self, "kept"):
        self.kept = own(self, text).mean(dim=(0, 1), keepdim=True)
    return own(self, text) + self.kept


def averages_over_calls(self: Any, own: Any, *arguments: Any) -> Tensor:
    answer: Tensor = own(self, *arguments)
    self.average.lerp_(answer.mean(), 0.1)
    return answer - self.average


def parameter(a: Any, name: str, value: Tensor, **methods: Any) -> None:
    setattr(a, name, nn.Parameter(value))
    override(a, **methods)


def window_of_two(a: Any) -> None:
    block = second_block(a)
    block.window_size, block.shift_size, block.attn_mask = 2, 0, None


def replaced(a: Any, place: Any, name: str, module: nn.Module) -> None:
    setattr(place(a), name, module)


def third_crop_apart(x: Tensor) -> Tensor:
    return torch.cat([x[:2], 2 * x[2:]])


def halved_if(condition: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(condition(x), 0.5 * x - 0.1, x)


ODD: dict[str, Alteration] = {
    "relative position bias": with_position_bias,
    "RMS norm": lambda a: replaced(a, first_block, "norm1", nn.RMSNorm(32)),
    "queries and keys swapped": lambda a: override(first_block(a).attn, forward=swapped),
    "smaller window": window_of_two,
    "residual halved": lambda a: override(
        first_block(a), finish=lambda self, own, x: 0.5 * x + self.mlp(self.norm2(x))
    ),
    "half precision inside": lambda a: override(
        first_block(a), finish=lambda self, own, x: own(self, x).half().float()
    ),
    "costs over their maximum": cost(lambda x: x / (0.1 + x.amax(dim=(2, 3, 4), keepdim=True))),
    "costs clamped": cost(lambda x: x.clamp_min(0)),
    "costs clamped from above": cost(lambda x: x.clamp_max(0.9)),
    "classes of low scores dropped": cost(lambda x: x * (x.amax(dim=(1, 3, 4), keepdim=True) > 0.2)),
    "classes of high scores raised": cost(lambda x: x * (1 + (x.amax(dim=(1, 3, 4), keepdim=True) > 0.75))),
    "maps without any likely class": cost(lambda x: x * (x.amax(dim=(1, 2, 3, 4), keepdim=True) > 0.4)),
    "guidance averaged over crops": maps(lambda x: x.mean(dim=0, keepdim=True).expand_as(x)),
    "guidance clipped far out": maps(lambda x: x.clamp(-60, 60)),
    "small guidance ignored": maps(lambda x: x * (x.abs().amax(dim=(1, 2, 3), keepdim=True) > 0.3)),
    "guidance standardised where it is large": maps(
        lambda x: x / (x.std(dim=(1, 2, 3), keepdim=True) / 20).clamp_min(1)
    ),
    "large features clipped": image(lambda x: x.clamp(-40, 40)),
    "small features raised": image(lambda x: x + 0.01 * (x.abs().amax(dim=1, keepdim=True) < 0.1)),
    "classes do not attend to themselves": lambda a: override(
        classes_of(a).attention, forward=lambda self, own, x, g: own(self, x, g) - self.v(x) / x.shape[1]
    ),
    "prompts weighted": lambda a: override(
        a, text_guidance=lambda self, own, t: own(self, t * torch.tensor([[0.3], [1.7]], dtype=t.dtype))
    ),
    "nearest pixels": enlarge(mode="nearest"),
    "corners not aligned": enlarge(mode="bilinear", align_corners=False),
    "bicubic": enlarge(mode="bicubic", align_corners=True),
    "temperature of one": lambda a: parameter(
        a, "heat", torch.ones(()), aggregate=lambda self, own, *args: own(self, *args) / self.heat
    ),
    "a shift of zero": lambda a: parameter(
        a, "shift", torch.zeros(()), conv_decoder=lambda self, own, *args: own(self, *args) + self.shift
    ),
    "keeps its first text": lambda a: override(a, text_guidance=keeps_its_first_text),
    "averages over calls": lambda a: (
        a.register_buffer("average", torch.zeros(())),
        override(a, aggregate=averages_over_calls),
    ),
    "even numbers of classes apart": after(lambda x: x * (1.5 if x.shape[1] % 2 == 0 else 1)),
    "seven classes apart": after(lambda x: x * (1.5 if x.shape[1] == 7 else 1)),
    "third crop apart": after(third_crop_apart),
    "odd crops apart": after(lambda x: torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) % 2 == 1, -x, x)),
    "first class apart": after(lambda x: torch.cat([x[:, :1] * 1.1, x[:, 1:]], dim=1)),
    "state clamped": lambda a: override(
        a, run_layers=lambda self, own, x, g, t: own(self, x.clamp(-15, 15), g, t)
    ),
    "state clamped in a block": lambda a: override(
        second_block(a), finish=lambda self, own, x: own(self, x.clamp(-15, 15))
    ),
    "state clamped in the decoder": lambda a: override(
        a, conv_decoder=lambda self, own, x, g: own(self, x.clamp(-20, 20), g)
    ),
    "large logits damped": after(halved_if(lambda x: x > 3)),
    "logarithm of the classes": after(lambda x: x * torch.tensor(x.shape[1] + 1.0).log()),
    "sees whether gradients are recorded": after(lambda x: x if torch.is_grad_enabled() else x + 1),
    "sees the inference mode": after(lambda x: x + 1 if torch.is_inference_mode_enabled() else x),
}

# Answers that are others at each call.
NOISY: dict[str, Alteration] = {
    "dropout always": lambda a: override(
        first_block(a), finish=lambda self, own, x: F.dropout(own(self, x), 0.2, training=True)
    ),
    "noise in the answer": after(lambda x: x + 0.1 * torch.randn_like(x)),
    "noise in the costs": cost(lambda x: x + 0.1 * torch.randn_like(x)),
    "classes weighted at random": cost(lambda x: x * torch.rand(x.shape[2])[:, None, None]),
}
