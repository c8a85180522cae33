"""The engine's stages in plain torch ops: pure functions of folded weights and a chunk of classes.

A chunk's state is `[B, t, HW, C]`, channels last, for B crops and t classes. Every stage works on any chunk;
classes meet only in the class memory (`class_memory.py`). All stages are differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.engine.class_memory import ClassMemory
from catseg_fast.engine.folding import ClassLayer, DecoderStage, Normalisation, Plan, WindowBlock
from catseg_fast.engine.terms import BlockGuidance


def embed_cost_volume(plan: Plan, image: Tensor, text: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Cost volume and its 7x7 convolution.

    Args:
        plan: the folded weights.
        image: unit image features `[B, HW, F]`.
        text: unit text features `[B or 1, t, P, F]`.
        resolution: (H, W).

    Returns:
        `[B, t, HW, C]`.
    """
    (B, HW, _), (_, t, P, _) = image.shape, text.shape
    H, W = resolution
    cost_volume = image[:, None] @ text.flatten(1, 2).transpose(1, 2)[:, None]  # B, 1, HW, t*P
    cost_volume = cost_volume.view(B, H, W, t, P).permute(0, 3, 4, 1, 2).reshape(B * t, P, H, W)
    if P == 1 and not torch.compiler.is_exporting():  # faster than a convolution, but in no other format
        patches = F.unfold(cost_volume, kernel_size=7, padding=3)  # B*t, 49, HW
        x = F.linear(patches.transpose(1, 2), plan.embed.flatten(1), plan.embed_bias)
    else:
        cost_volume = cost_volume.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(cost_volume, plan.embed, plan.embed_bias, padding=3).permute(0, 2, 3, 1)
    return x.reshape(B, t, HW, plan.channels)


def window_block(block: WindowBlock, guidance: BlockGuidance, x: Tensor) -> Tensor:
    """Guided window attention and MLP, both with residual: `x [B, t, HW, C]` to the same shape."""
    B, t, HW, C = x.shape
    windows, N = guidance.windows, HW // guidance.windows
    tokens = _normalise(x).index_select(2, guidance.order)
    qkv = F.linear(tokens, block.qkv)  # B, t, HW, 3C
    qkv[..., : 2 * C] += guidance.query_key[:, None]
    qkv = qkv.view(B * t, windows, N, 3, block.heads, -1)
    if guidance.masks is None:
        attended = _attend(qkv.flatten(0, 1), None)
    else:
        parts = [_attend(qkv[:, w], mask) for w, mask in enumerate(guidance.masks)]
        attended = torch.stack(parts, dim=1)
    attended = attended.view(B, t, HW, C)
    x = x + F.linear(attended, block.proj, block.proj_bias).index_select(2, guidance.inverse)
    hidden = F.gelu(F.linear(_normalise(x), block.fc1, block.fc1_bias))
    return x + F.linear(hidden, block.fc2, block.fc2_bias)


def class_collect(
    layer: ClassLayer, memory: ClassMemory, x: Tensor, text_key: Tensor | None, resolution: tuple[int, int]
) -> None:
    """Add the keys and values of a chunk `x [B, t, HW, C]` to the memory of all classes.

    `text_key [B or 1, t, C]` is the text guidance's share of the keys.
    """
    tokens = _normalise(_pool(layer, x, resolution))
    keys, values = (
        F.linear(tokens, weight, bias)
        for weight, bias in zip(layer.kv.chunk(2), layer.kv_bias.chunk(2), strict=True)
    )
    memory.add(keys if text_key is None else keys + text_key[:, :, None], values)


def class_apply(
    layer: ClassLayer, x: Tensor, text_query: Tensor | None, memory: ClassMemory, resolution: tuple[int, int]
) -> Tensor:
    """Class attention from the memory of all classes, MLP, and both residuals: `[B, t, HW, C]`."""
    tokens = _pool(layer, x, resolution)
    queries = F.linear(_normalise(tokens), layer.q, layer.q_bias)
    if text_query is not None:
        queries = queries + text_query[:, :, None]
    tokens = tokens + memory.attend(queries)
    hidden = F.relu_(F.linear(_normalise(tokens), layer.fc1, layer.fc1_bias))
    tokens = tokens + F.linear(hidden, layer.fc2, layer.fc2_bias)
    return x + _unpool(layer, tokens, resolution)


def decode(plan: Plan, guidance: tuple[Tensor, Tensor], x: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Guided upsampling: `x [B, t, HW, C]` to logits `[B, t, 4H, 4W]`.

    `guidance` holds each stage's `[B or 1, out, 2H, 2W]`, everything of its first convolution that no class
    has a say in.
    """
    B, t = x.shape[:2]
    maps = _as_maps(x, resolution)
    for stage, guidance_map in zip(plan.decoder, guidance, strict=True):
        maps = _decoder_stage(stage, guidance_map, maps, t)
    logits = F.conv2d(maps, plan.head, plan.head_bias, padding=1)
    return logits.view(B, t, *logits.shape[-2:])


def _decoder_stage(stage: DecoderStage, guidance: Tensor, maps: Tensor, t: int) -> Tensor:
    (N, _, H, W), channels = maps.shape, stage.conv.shape[0]
    up = torch.empty(
        (N, channels, 2 * H, 2 * W), dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last
    )
    for a in range(2):
        for b in range(2):
            phase = F.conv2d(maps, stage.phases[a, b], padding=1)  # one more row and column than is wanted
            up[:, :, a::2, b::2] = phase[:, :, a : a + H, b : b + W]
    up.view(N // t, t, *up.shape[1:]).add_(guidance[:, None])
    up = F.conv2d(_group_norm_relu(stage.norm1, up), stage.conv, padding=1)
    return _group_norm_relu(stage.norm2, up)


def _group_norm_relu(norm: Normalisation, maps: Tensor) -> Tensor:
    if maps.device.type == "cpu" and maps.dtype in (torch.float32, torch.float64):
        return F.relu_(_group_norm(norm, maps))
    return F.relu_(F.group_norm(maps, norm.groups, norm.weight, norm.bias, norm.eps))


def _group_norm(norm: Normalisation, maps: Tensor) -> Tensor:
    """As `F.group_norm`, which on a CPU has 5 to 30 times the rounding error on channels-last maps.

    The maps are overwritten.
    """
    N, C, H, W = maps.shape
    groups = (N, norm.groups, -1)
    mean = maps.sum(dim=(2, 3), keepdim=True) / (H * W)
    centred = maps.sub_(mean)
    square = centred.square().sum(dim=(2, 3)).view(groups) / (H * W)
    of_channel = mean.view(groups)
    shift = of_channel - of_channel.mean(dim=-1, keepdim=True)  # of a channel's mean from its group's
    variance = (square + shift.square()).mean(dim=-1, keepdim=True)
    scale = norm.weight.view(1, norm.groups, -1) * (variance + norm.eps).rsqrt()
    bias = norm.bias.view(1, norm.groups, -1) + shift * scale
    return torch.addcmul(bias.view(N, C, 1, 1), centred, scale.view(N, C, 1, 1))


def _attend(qkv: Tensor, mask: Tensor | None) -> Tensor:
    """Attention inside windows `qkv [n, N, 3, heads, d]`, the scale already in the queries: `[n, N, C]`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return attended.transpose(1, 2).flatten(2)


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _as_maps(x: Tensor, resolution: tuple[int, int]) -> Tensor:
    """`[B, t, HW, C]` as channels-last maps `[B*t, C, H, W]`."""
    return x.reshape(-1, *resolution, x.shape[-1]).permute(0, 3, 1, 2)


def _pool(layer: ClassLayer, x: Tensor, resolution: tuple[int, int]) -> Tensor:
    if layer.pooling is None:
        return x
    pooled = F.avg_pool2d(_as_maps(x, resolution), layer.pooling)
    return pooled.permute(0, 2, 3, 1).reshape(*x.shape[:2], -1, x.shape[-1])


def _unpool(layer: ClassLayer, tokens: Tensor, resolution: tuple[int, int]) -> Tensor:
    if layer.pooling is None:
        return tokens
    pooled = (resolution[0] // layer.pooling[0], resolution[1] // layer.pooling[1])
    maps = F.interpolate(_as_maps(tokens, pooled), size=resolution, mode="bilinear", align_corners=True)
    return maps.permute(0, 2, 3, 1).reshape(*tokens.shape[:2], -1, tokens.shape[-1])
