"""Guided upsampling decoder (CAT-Seg paper, section 3.4): `stages.decode` in nine kernels.

For x `[B, t, HW, C]` and each of two stages, with GN group normalisation and g an image's guidance map, the
same for every class:

    u = phases(x) + g        y = conv3x3(relu(GN(u)))        x' = relu(GN(y))

and logits = head(x'), a 3x3 convolution to one channel. The five convolutions are `convolution.py`'s kernel,
each of which reads its input through the normalisation before it and leaves the statistics of its output;
`group_norm.py` merges them. In memory are u and y alone, `[B*t, 2H, 2W, out]` channels last; never
materialised are the upsampled maps `[B*t, up, 2H, 2W]`, their concatenation with the guidance
`[B*t, up + G, 2H, 2W]`, the normalised maps, and patches.

The op computes in x's type whatever autocast says, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catseg_fast.engine.folding import DecoderStage, Plan
from catseg_fast.kernels import convolution
from catseg_fast.kernels.convolution import Config, Size
from catseg_fast.kernels.decoder import group_norm
from catseg_fast.kernels.launch.checks import DTYPES, check_like, check_runnable
from catseg_fast.kernels.launch.compile_target import CompileTarget
from catseg_fast.kernels.launch.tunable import Tunable, Workload


def sizes(height: int, width: int, channels: int, stages: Sequence[int]) -> list[Size]:
    """Sizes of the convolutions: two for each stage, of whose output channels is given, and the head."""
    found = []
    for out in stages:
        found.append(Size(height, width, channels, out, taps=2, scale=2))
        height, width, channels = 2 * height, 2 * width, out
        found.append(Size(height, width, channels, channels, taps=3))
    return [*found, Size(height, width, channels, 1, taps=3)]


def launch(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    height: int,
    width: int,
    input_precision: str,
    configs: Sequence[Config] | None = None,
) -> Tensor:
    """`decode` on tensors. Nothing is checked.

    Args:
        guidance: of each stage, `[B or 1, 2H * 2W, out]`.
        weights: of each stage, `[4 * out, 2, 2, in]`, two `[out]`, `[out, 3, 3, out]` and two `[out]`; then
            the head's `[1, 3, 3, out]` and `[1]`; all contiguous.
        groups: of each stage's two normalisations.
        eps: likewise.
        configs: of each convolution; None for measured ones, or the defaults.
    """
    B, t, _, C = x.shape
    convolutions = sizes(height, width, C, [maps.shape[-1] for maps in guidance])
    if configs is None:
        configs = [convolution.choose_config("decode", size, x, input_precision) for size in convolutions]
    norm: Tensor | None = None
    for index in range(2 * len(guidance)):
        weight, scale, shift = weights[3 * index : 3 * index + 3]
        size, config = convolutions[index], configs[index]
        x, statistics = convolution.launch(
            x,
            weight,
            size,
            config,
            addend=guidance[index // 2] if index % 2 == 0 else None,
            norm=norm,
            statistics=True,
            input_precision=input_precision,
        )
        assert statistics is not None
        norm = group_norm.launch(statistics, scale, shift, groups[index], eps[index], size, config)
    head, bias = weights[-2:]
    logits, _ = convolution.launch(
        x, head, convolutions[-1], configs[-1], addend=bias, norm=norm, input_precision=input_precision
    )
    factor = 2 ** len(guidance)
    return logits.view(B, t, factor * height, factor * width)


@torch.library.custom_op("catseg_fast::decode", mutates_args=())
def _decode(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    height: int,
    width: int,
    input_precision: str,
) -> Tensor:
    return launch(x, guidance, weights, groups, eps, height, width, input_precision)


@_decode.register_fake
def _(
    x: Tensor,
    guidance: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    eps: Sequence[float],
    height: int,
    width: int,
    input_precision: str,
) -> Tensor:
    factor = 2 ** len(guidance)
    return x.new_empty((*x.shape[:2], factor * height, factor * width))


def decode(
    plan: Plan,
    guidance: tuple[Tensor, Tensor],
    x: Tensor,
    resolution: tuple[int, int],
    input_precision: str = "ieee",
) -> Tensor:
    """`stages.decode` on Triton kernels, any sizes.

    Args:
        plan: the folded weights, in x's type.
        guidance: of each stage, everything of its first convolution that no class has a say in,
            `[B or 1, out, 2H, 2W]` and `[B or 1, out, 4H, 4W]`; channels last spares a copy.
        x: `[B, t, HW, C]`, of at least one class; fp16, bf16 or fp32.
        resolution: (H, W).
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Returns:
        Logits `[B, t, 4H, 4W]`.

    Raises:
        ValueError: if an argument has a wrong shape, type or device.
        RuntimeError: if the GPU is too old.
    """
    height, width = resolution
    _check(plan, guidance, x, height, width, input_precision)
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        x = x.contiguous()
    norms = [norm for stage in plan.decoder for norm in (stage.norm1, stage.norm2)]
    return _decode(
        x,
        [maps.permute(0, 2, 3, 1).flatten(1, 2).contiguous() for maps in guidance],
        [
            *(weight for stage in plan.decoder for weight in _weights(stage)),
            _taps_first(plan.head),
            plan.head_bias,
        ],
        [norm.groups for norm in norms],
        [norm.eps for norm in norms],
        height,
        width,
        input_precision,
    )


def tunables(workload: Workload) -> list[Tunable]:
    """The convolutions, each with the merge of its statistics, of which its tiles are the parts."""
    return [
        _tunable(workload, size, has_norm=index > 0)
        for index, size in enumerate(
            sizes(workload.height, workload.width, workload.channels, workload.decoder)
        )
    ]


def _tunable(workload: Workload, size: Size, has_norm: bool) -> Tunable:
    w, B, t = workload, workload.crops, workload.classes
    is_head, groups = size.channels_out == 1, max(1, size.channels_out // 16)

    def make_inputs(device: torch.device) -> tuple[Tensor | None, ...]:
        x = w.normal(device, B, t, size.pixels, size.channels_in)
        addend = norm = None
        if is_head:
            addend = w.normal(device, 1)
        elif size.scale == 2:
            addend = w.normal(device, B, size.phases * size.pixels, size.channels_out)
        if has_norm:
            norm = w.normal(device, B * t, 2, size.channels_in).to(convolution.norm_dtype(w.dtype))
        scale, shift = (w.normal(device, size.channels_out) for _ in range(2))
        return x, convolution.random_weight(w, size, device), addend, norm, scale, shift

    def run(inputs: Sequence[Any], config: Config) -> Sequence[Tensor]:
        x, weight, addend, norm, scale, shift = inputs
        out, statistics = convolution.launch(
            x,
            weight,
            size,
            config,
            addend=addend,
            norm=norm,
            statistics=not is_head,
            input_precision=w.input_precision,
        )
        if statistics is None:
            return (out,)
        return out, group_norm.launch(statistics, scale, shift, groups, 1e-5, size, config)

    return Tunable(
        convolution.problem("decode", size, w.dtype, w.input_precision, w.crop_classes),
        convolution.candidates(size, w.dtype, w.capability),
        make_inputs,
        run,
    )


def compile_targets(capability: int) -> list[CompileTarget]:
    """The kernels at the sizes of the published variants."""
    targets = []
    for dtype, precision in [*((dtype, "ieee") for dtype in DTYPES), (torch.float32, "tf32x3")]:
        up1, conv1, up2, conv2, head = sizes(24, 24, 128, (64, 32))
        kinds = [
            ("phases 1", up1, {"addend": "map", "statistics": True}),
            ("conv 1", conv1, {"norm": True, "statistics": True}),
            ("phases 2", up2, {"addend": "map", "norm": True, "statistics": True}),
            ("conv 2", conv2, {"norm": True, "statistics": True}),
            ("head", head, {"addend": "bias", "norm": True}),
        ]
        targets += [
            convolution.compile_target(name, size, dtype, capability, precision, **options)  # type: ignore[arg-type]
            for name, size, options in kinds
        ]
        if precision == "ieee":
            config = convolution.default_config(up1, dtype, capability)
            targets.append(group_norm.compile_target("group norm", up1, dtype, 4, config))
    return targets


def _check(
    plan: Plan, guidance: Sequence[Tensor], x: Tensor, height: int, width: int, input_precision: str
) -> None:
    if x.ndim != 4 or x.shape[2] != height * width or not x.numel():
        raise ValueError(
            f"x: has shape {list(x.shape)}; wanted [B, t, {height * width}, C] with none of them 0, "
            f"for a resolution of {height}x{width}"
        )
    check_runnable("x", x, input_precision)
    if len(guidance) != len(plan.decoder):
        raise ValueError(
            f"guidance: has {len(guidance)} maps; wanted {len(plan.decoder)}, one a decoder stage"
        )
    channels = x.shape[3]
    for index, (stage, maps) in enumerate(zip(plan.decoder, guidance, strict=True)):
        out = stage.conv.shape[0]
        height, width = 2 * height, 2 * width
        check_like(f"guidance[{index}]", maps, ((1, x.shape[0]), out, height, width), x)
        check_like(f"plan.decoder[{index}].phases", stage.phases, (2, 2, out, channels, 2, 2), x)
        check_like(f"plan.decoder[{index}].conv", stage.conv, (out, out, 3, 3), x)
        channels = out
    check_like("plan.head", plan.head, (1, channels, 3, 3), x)


def _weights(stage: DecoderStage) -> tuple[Tensor, ...]:
    return (
        _taps_first(stage.phases.flatten(0, 2)),
        stage.norm1.weight,
        stage.norm1.bias,
        _taps_first(stage.conv),
        stage.norm2.weight,
        stage.norm2.bias,
    )


def _taps_first(weight: Tensor) -> Tensor:
    """`[out, in, K, K]` as `[out, K, K, in]`, contiguous: no copy if it is channels last."""
    return weight.permute(0, 2, 3, 1).contiguous()
