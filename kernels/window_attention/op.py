"""Guided shifted-window attention block (CAT-Seg paper, section 3.3): attention and MLP, with residuals.

For x `[B, t, HW, C]` (B crops, t classes, C channels), windows of N tokens and norm without affine part:

    q, k, v = norm(x) W^T + (g_q, g_k, 0)
    y = x + softmax(q k^T + mask) v W_p^T + b_p
    out = y + GELU(norm(y) W_1^T + b_1) W_2^T + b_2

Three kernels: `qkv.py`, from image order to window order; `attention.py`, whose result takes the queries'
place; `mlp.py`, back to image order. Between them there is one buffer `[B, t, HW, 3C]`, and nothing of what
they name as never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from catseg_fast.engine.folding import WindowBlock
from catseg_fast.engine.terms import BlockGuidance
from catseg_fast.kernels.launch import configs as tuning
from catseg_fast.kernels.launch.checks import check_like, check_runnable
from catseg_fast.kernels.launch.tunable import Tunable, Workload
from catseg_fast.kernels.window_attention import attention, mlp
from catseg_fast.kernels.window_attention import qkv as projection
from catseg_fast.kernels.window_attention.windows import Windows
from catseg_fast.reference.window_attention import fit_window

MAX_CHANNELS = 256
MAX_WINDOW = 24


@dataclass(frozen=True)
class Config:
    """Launch configs of the three kernels."""

    qkv: projection.QKVConfig
    attention: attention.AttentionConfig
    mlp: mlp.MLPConfig


# Few and large programs.
INTERPRETER = Config(
    projection.QKVConfig(rows=512, channels=256, classes=1024, num_warps=4, num_stages=1),
    attention.AttentionConfig(queries=256, num_warps=4),
    mlp.MLPConfig(rows=1024, hidden=128, num_warps=4, num_stages=1),
)


@cache
def default_config(
    capability: int, dtype: torch.dtype, channels: int, heads: int, window: int, input_precision: str
) -> Config:
    """Configs that fit every GPU of a compute capability (as 80, 86, 89, 90, 100)."""
    return Config(
        projection.default_config(capability, dtype, channels, input_precision),
        attention.default_config(capability, dtype, channels // heads, window),
        mlp.default_config(capability, dtype, channels),
    )


def choose_config(x: Tensor, heads: int, window: int, hidden: int, input_precision: str) -> Config:
    """The configs of each kernel for `x [B, t, HW, C]` and M = `hidden`."""
    (B, t, HW, C), device = x.shape, x.device
    sizes = (x.dtype, input_precision, B * t, HW, C)

    def default(capability: int) -> Config:
        return default_config(capability, x.dtype, C, heads, window, input_precision)

    return Config(
        tuning.choose(projection.problem(*sizes), device, lambda gpu: default(gpu).qkv, INTERPRETER.qkv),
        tuning.choose(
            attention.problem(*sizes, heads, window),
            device,
            lambda gpu: default(gpu).attention,
            INTERPRETER.attention,
        ),
        tuning.choose(mlp.problem(*sizes, hidden), device, lambda gpu: default(gpu).mlp, INTERPRETER.mlp),
    )


def tunables(workload: Workload) -> list[Tunable]:
    """The three kernels."""
    return [module.tunable(workload) for module in (projection, attention, mlp)]


def launch(
    x: Tensor,
    query_key: Tensor,
    qkv: Tensor,
    weights: Sequence[Tensor],
    windows: Windows,
    heads: int,
    input_precision: str,
    config: Config,
) -> Tensor:
    """The block on tensors, nothing checked; `weights` are those of `mlp.launch`."""
    buffer = projection.launch(x, qkv, query_key, windows, input_precision, config.qkv)
    attention.launch(buffer, windows, heads, input_precision, config.attention)
    return mlp.launch(x, buffer, weights, windows, input_precision, config.mlp)


# Computes in the type of x and accumulates in fp32; autocast changes nothing.
@torch.library.custom_op("catseg_fast::window_block", mutates_args=())
def _window_block(
    x: Tensor,
    query_key: Tensor,
    qkv: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    height: int,
    width: int,
    window: int,
    shift: int,
    heads: int,
    input_precision: str,
) -> Tensor:
    windows, weights = Windows(height, width, window, shift), (proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias)
    config = choose_config(x, heads, window, len(fc1), input_precision)
    return launch(x, query_key, qkv, weights, windows, heads, input_precision, config)


@_window_block.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def unsupported(block: WindowBlock) -> str | None:
    """Why the kernels cannot run a block, for a fall-back to `stages`; None if they can."""
    C = len(block.proj)
    if C % 16 or C > MAX_CHANNELS or C % block.heads:
        wanted = f"a multiple of 16 up to {MAX_CHANNELS}, and of the heads"
        return f"{C} channels in {block.heads} heads; wanted {wanted}"
    if block.window > MAX_WINDOW:
        return f"a window of {block.window}; wanted one up to {MAX_WINDOW}"
    return None


def window_block(
    block: WindowBlock, guidance: BlockGuidance, x: Tensor, input_precision: str = "ieee"
) -> Tensor:
    """`stages.window_block` on Triton kernels.

    Args:
        block: the folded weights, in x's type; channels a multiple of 16 up to 256.
        guidance: the image's share, of which `query_key [B or 1, HW or 1, 2C]` and `resolution` are used.
        x: `[B, t, HW, C]`, of at least one class; fp16, bf16 or fp32.
        input_precision: of products of fp32 numbers: "ieee", "tf32x3" or "tf32".

    Returns:
        `[B, t, HW, C]`.

    Raises:
        ValueError: if an argument has a wrong shape, type or device, or a size that the kernels do not have.
        RuntimeError: if the GPU is too old.
    """
    height, width = guidance.resolution
    window, shift = fit_window(guidance.resolution, block.window, block.shift)
    windows = Windows(height, width, window, shift)
    _check(block, guidance, x, windows, input_precision)
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        x = x.contiguous()
    weights = (block.qkv, block.proj, block.proj_bias, block.fc1, block.fc1_bias, block.fc2, block.fc2_bias)
    tensors = (tensor.contiguous() for tensor in (guidance.query_key, *weights))
    return _window_block(x, *tensors, *windows, block.heads, input_precision)


def _check(
    block: WindowBlock, guidance: BlockGuidance, x: Tensor, windows: Windows, input_precision: str
) -> None:
    height, width, window, _ = windows
    if x.ndim != 4 or x.shape[2] != height * width or not x.numel():
        raise ValueError(
            f"x: has shape {list(x.shape)}; wanted [B, t, {height * width}, C] with none of them 0, "
            f"for a resolution of {height}x{width}"
        )
    check_runnable("x", x, input_precision)
    (B, t, HW, C), M = x.shape, len(block.fc1)
    if reason := unsupported(block):
        raise ValueError(f"block: has {reason}")
    if height % window or width % window:
        raise ValueError(f"block: has a window of {window}, which does not divide {height}x{width}")
    if B * t * HW >= 2**31:
        raise ValueError(f"x: has {B * t * HW} tokens; wanted less than 2**31")
    check_like("block.qkv", block.qkv, (3 * C, C), x)
    check_like("block.proj", block.proj, (C, C), x)
    check_like("block.proj_bias", block.proj_bias, (C,), x)
    check_like("block.fc1", block.fc1, (M, C), x)
    check_like("block.fc1_bias", block.fc1_bias, (M,), x)
    check_like("block.fc2", block.fc2, (C, M), x)
    check_like("block.fc2_bias", block.fc2_bias, (C,), x)
    check_like("guidance.query_key", guidance.query_key, ((1, B), (1, HW), 2 * C), x)
