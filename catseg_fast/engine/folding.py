"""Weights of an aggregator, folded once into the form that the engine's stages use.

Each step is an identity, by linearity or by softmax's invariance to a constant, and changes results only by
rounding:

- LayerNorm's affine parameters move into the following linear layer, the attention scale into the query
  weights.
- Queries and keys are linear in `[x ; guidance]`: the guidance half is split off, to be applied once per
  image (appearance) or once per vocabulary (text).
- A key bias that is the same for every key cancels in a softmax. As the softmax's rows sum to one, the value
  bias moves into the projection's bias.
- All padding tokens of the class attention are equal: one key and one value represent them.
- ConvTranspose 2x2 and the following 3x3 convolution are one 2x2 convolution for each of the 4 output phases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class WindowBlock:
    """One window-attention block; C channels, G guidance channels, M hidden channels."""

    heads: int
    window: int
    shift: int
    qkv: Tensor  # [3C, C], for the normalised input; without bias
    guidance: Tensor | None  # [2C, G], queries and keys of the normalised guidance
    guidance_bias: Tensor  # [2C]; the keys' half has no effect and is zero
    proj: Tensor  # [C, C]
    proj_bias: Tensor  # [C]
    fc1: Tensor  # [M, C], for the normalised input
    fc1_bias: Tensor  # [M]
    fc2: Tensor  # [C, M]
    fc2_bias: Tensor  # [C]


@dataclass(frozen=True, eq=False)
class ClassLayer:
    """One class-attention layer; C channels, d = C / heads, M hidden channels, G text-guidance channels."""

    heads: int
    linear: bool  # linear attention, or softmax attention
    eps: float
    pooling: tuple[int, int] | None
    pad_len: int
    q: Tensor  # [C, C], for the normalised input
    q_bias: Tensor  # [C]
    kv: Tensor  # [2C, C], for the normalised input
    kv_bias: Tensor  # [2C]
    text: Tensor | None  # [2C, G], for queries and keys of the text guidance
    padding: Tensor | None  # [2C], key and value of a padding token
    fc1: Tensor  # [M, C], for the normalised input
    fc1_bias: Tensor  # [M]
    fc2: Tensor  # [C, M]
    fc2_bias: Tensor  # [C]


@dataclass(frozen=True)
class Normalisation:
    """Group normalisation."""

    groups: int
    eps: float
    weight: Tensor  # [C]
    bias: Tensor  # [C]


@dataclass(frozen=True, eq=False)
class DecoderStage:
    """One decoder stage: phase convolutions, normalisation, 3x3 convolution, normalisation."""

    phases: Tensor  # [2, 2, out, in, 2, 2]: output row and column phase first
    guidance: Tensor | None  # [out, G, 3, 3]
    bias: Tensor  # [1, out, 3, 3]: biases of the corners, the edges and the interior
    norm1: Normalisation
    conv: Tensor  # [out, out, 3, 3]
    norm2: Normalisation


@dataclass(frozen=True)
class Layer:
    """One aggregation layer."""

    blocks: tuple[WindowBlock, WindowBlock]
    guidance_eps: float
    classes: ClassLayer


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole aggregator, but for its guidance projections, whose modules run once per image."""

    embed: Tensor  # [C, P, 7, 7]
    embed_bias: Tensor  # [C]
    layers: tuple[Layer, ...]
    decoder: tuple[DecoderStage, DecoderStage]
    head: Tensor  # [1, c, 3, 3]
    head_bias: Tensor  # [1]

    @property
    def channels(self) -> int:
        """Hidden channels, C."""
        return self.embed.shape[0]

    @property
    def prompts(self) -> int:
        """Prompts per class, P."""
        return self.embed.shape[1]


def build_plan(aggregator: Any, dtype: torch.dtype) -> Plan:
    """Fold an aggregator's weights, in fp32 at least, and cast the result to `dtype`.

    Args:
        aggregator: a `catseg_fast.reference.Aggregator`, or an object built like upstream's.
        dtype: type in which the stages compute.
    """
    plan = Plan(
        embed=wide(aggregator.conv1.weight),
        embed_bias=wide(aggregator.conv1.bias),
        layers=tuple(_fold_layer(layer) for layer in aggregator.layers),
        decoder=(_fold_decoder(aggregator.decoder1), _fold_decoder(aggregator.decoder2)),
        head=wide(aggregator.head.weight),
        head_bias=wide(aggregator.head.bias),
    )
    folded: Plan = cast(plan, dtype)
    return folded


def _fold_layer(layer: Any) -> Layer:
    spatial = layer.swin_block
    norm = spatial.guidance_norm
    return Layer(
        blocks=(_fold_block(spatial.block_1, norm), _fold_block(spatial.block_2, norm)),
        guidance_eps=norm.eps if norm is not None else 0.0,
        classes=_fold_classes(layer.attention),
    )


def _fold_block(block: Any, guidance_norm: nn.LayerNorm | None) -> WindowBlock:
    attention, mlp = block.attn, block.mlp
    channels = attention.dim
    scale = attention.scale
    q, k = wide(attention.q.weight) * scale, wide(attention.k.weight)
    v, v_bias = _fold_norm(wide(attention.v.weight), _bias(attention.v), block.norm1)
    q_bias = _bias(attention.q) * scale
    q_x, q_bias = _fold_norm(q[:, :channels], q_bias, block.norm1)
    k_x, _ = _fold_norm(k[:, :channels], _bias(attention.k), block.norm1)
    guidance = None
    if guidance_norm is not None:
        q_g, q_bias = _fold_norm(q[:, channels:], q_bias, guidance_norm)
        k_g, _ = _fold_norm(k[:, channels:], torch.zeros_like(q_bias), guidance_norm)
        guidance = torch.cat([q_g, k_g])
    proj = wide(attention.proj.weight)
    fc1, fc1_bias = _fold_norm(wide(mlp.fc1.weight), _bias(mlp.fc1), block.norm2)
    window, shift = getattr(block, "nominal_window", (block.window_size, block.shift_size))
    return WindowBlock(
        heads=attention.num_heads,
        window=window,
        shift=shift,
        qkv=torch.cat([q_x, k_x, v]),
        guidance=guidance,
        guidance_bias=torch.cat([q_bias, torch.zeros_like(q_bias)]),
        proj=proj,
        proj_bias=_bias(attention.proj) + proj @ v_bias,
        fc1=fc1,
        fc1_bias=fc1_bias,
        fc2=wide(mlp.fc2.weight),
        fc2_bias=_bias(mlp.fc2),
    )


def _fold_classes(layer: Any) -> ClassLayer:
    attention = layer.attention
    channels = attention.v.weight.shape[1]
    q, k, v = (wide(linear.weight) for linear in (attention.q, attention.k, attention.v))
    q_x, q_bias = _fold_norm(q[:, :channels], _bias(attention.q), layer.norm1)
    k_x, k_bias = _fold_norm(k[:, :channels], _bias(attention.k), layer.norm1)
    v_x, v_bias = _fold_norm(v, _bias(attention.v), layer.norm1)
    kernel_size = getattr(layer.pool, "kernel_size", 1)
    pooling = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
    fc1, fc1_bias = _fold_norm(wide(layer.MLP[0].weight), _bias(layer.MLP[0]), layer.norm2)
    return ClassLayer(
        heads=attention.nheads,
        linear=hasattr(attention.attention, "eps"),
        eps=getattr(attention.attention, "eps", 0.0),
        pooling=None if pooling == (1, 1) else pooling,
        pad_len=getattr(layer, "pad_len", 0),
        q=q_x,
        q_bias=q_bias,
        kv=torch.cat([k_x, v_x]),
        kv_bias=torch.cat([k_bias, v_bias]),
        text=torch.cat([q[:, channels:], k[:, channels:]]) if q.shape[1] > channels else None,
        padding=_padding_key_value(layer),
        fc1=fc1,
        fc1_bias=fc1_bias,
        fc2=wide(layer.MLP[2].weight),
        fc2_bias=_bias(layer.MLP[2]),
    )


def _padding_key_value(layer: Any) -> Tensor | None:
    """Return key and value `[2C]` of a padding token, which are the same at every position."""
    if getattr(layer, "padding_tokens", None) is None:
        return None
    token, norm = wide(layer.padding_tokens)[0, 0], layer.norm1
    token = F.layer_norm(token, token.shape, wide(norm.weight), wide(norm.bias), norm.eps)
    guided = token
    if layer.padding_guidance is not None:
        guided = torch.cat([token, wide(layer.padding_guidance)[0, 0]])
    k, v = layer.attention.k, layer.attention.v
    return torch.cat([wide(k.weight) @ guided + _bias(k), wide(v.weight) @ token + _bias(v)])


def _fold_decoder(up: Any) -> DecoderStage:
    conv1, norm1, _, conv2, norm2, _ = up.conv.double_conv
    transposed = wide(up.up.weight)  # in, up, 2, 2
    channels = transposed.shape[1]
    up_conv, guidance = wide(conv1.weight).split([channels, conv1.in_channels - channels], dim=1)
    return DecoderStage(
        phases=compose_phases(transposed, up_conv),
        guidance=guidance if guidance.shape[1] else None,
        bias=F.conv2d(_bias(up.up).view(1, -1, 1, 1).expand(-1, -1, 3, 3), up_conv, padding=1),
        norm1=_normalisation(norm1),
        conv=wide(conv2.weight),
        norm2=_normalisation(norm2),
    )


def compose_phases(transposed: Tensor, conv: Tensor) -> Tensor:
    """Return 2x2 kernels `[2, 2, out, in, 2, 2]` of ConvTranspose(2, stride 2), then Conv3x3 (padding 1).

    Output pixel (2r + a, 2s + b) is kernel [a, b] applied to low-resolution rows r + a - 1 and r + a and
    columns s + b - 1 and s + b; pixels outside the map are zero.

    Args:
        transposed: weight of the transposed convolution, `[in, mid, 2, 2]`.
        conv: weight of the convolution, `[out, mid, 3, 3]`.
    """
    # taps[a, d, k, p]: in output phase a, row k of the 3x3 kernel is on phase p of low-resolution row d.
    taps = transposed.new_zeros(2, 2, 3, 2)
    for a in range(2):
        for k in range(3):
            row = a + k - 1  # row of the upsampled map, counted from 2r
            taps[a, row // 2 + 1 - a, k, row % 2] = 1
    return torch.einsum("adkp,belq,ockl,icpq->aboide", taps, taps, conv, transposed)


def _normalisation(norm: nn.GroupNorm) -> Normalisation:
    return Normalisation(norm.num_groups, norm.eps, wide(norm.weight), wide(norm.bias))


def _fold_norm(weight: Tensor, bias: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return weight and bias that include the affine parameters of the LayerNorm before them."""
    return weight * wide(norm.weight), bias + weight @ wide(norm.bias)


def _bias(layer: Any) -> Tensor:
    if layer.bias is None:
        return wide(layer.weight).new_zeros(layer.weight.shape[0])
    return wide(layer.bias)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cast(folded: Any, dtype: torch.dtype) -> Any:
    """Return the same dataclass or tuple with every floating tensor in it, at any depth, in `dtype`."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, folded)


def map_tensors(function: Callable[[Tensor], Tensor], folded: Any) -> Any:
    """Return the same dataclass or tuple with `function` applied to every tensor, in a fixed order."""
    if isinstance(folded, Tensor):
        return function(folded)
    if isinstance(folded, tuple):
        return tuple(map_tensors(function, item) for item in folded)
    if is_dataclass(folded) and not isinstance(folded, type):
        values = {field.name: map_tensors(function, getattr(folded, field.name)) for field in fields(folded)}
        return replace(folded, **values)
    return folded
