"""Implementations that are compared on the same weights and inputs, from upstream's to this package's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bench.cases import Call, Case
from catseg_fast import reference
from catseg_fast.backend import why_no_triton
from catseg_fast.engine.precision import tf32
from catseg_fast.engine.recording import Recorder
from catseg_fast.reference.window_attention import WindowAttention

Run = Callable[[], Tensor]
AUTOTUNED = ("v2-vitl", 150)  # the case that torch.compile tunes for


@dataclass(frozen=True)
class Baseline:
    """One way to compute a case.

    Attributes:
        name: name in tables, with its letter in BENCHMARKS.md.
        dtypes: types of the cases that it can compute.
        prepare: returns the function that is timed.
        ours: whether it has the restructured maths.
        gpu_only: why it needs a GPU; empty if it does not.
        on_cpu: what differs from a GPU, if it matters.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    prepare: Callable[[Call], Run]
    ours: bool = False
    gpu_only: str = ""
    on_cpu: str = ""

    @property
    def is_graph(self) -> bool:
        """True if it replays a graph, whose memory was allocated before."""
        return self.prepare is _graphed

    @property
    def compiles(self) -> bool:
        """True if its first call compiles, which takes memory of its own."""
        return self.prepare in (_compiled, _autotuned)

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Return why it cannot run a case on a device; None if it can."""
        if case.dtype not in self.dtypes:
            return f"has no answer in {case.dtype}"
        if self.gpu_only and device.type != "cuda":
            return self.gpu_only
        if self.gpu_only and (reason := why_no_triton(device)):
            return reason
        if self.compiles and case.selects:
            return "features in bf16 pick other classes than those in fp32"
        if self.prepare is _autotuned and (case.variant, case.classes) != AUTOTUNED:
            return f"takes minutes to compile, and does so only for {AUTOTUNED[0]}, T={AUTOTUNED[1]}"
        return None


class FusedWindowAttention(WindowAttention):
    """The reference's window attention with `scaled_dot_product_attention`."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `x [B * windows, N, dim + guidance]` to `[B * windows, N, dim]`, like the reference."""
        q, k, v = (
            rearrange(tensor, "W N (h d) -> W h N d", h=self.num_heads)
            for tensor in (self.q(x), self.k(x), self.v(x[..., : self.dim]))
        )
        if mask is not None:
            mask = mask.to(q.dtype).repeat(len(q) // len(mask), 1, 1)[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.proj(rearrange(attended, "W h N d -> W N (h d)"))


def graphed(run: Run) -> Run:
    """Record `run` as a CUDA graph; the next replay overwrites its result."""
    return Recorder(torch.device("cuda", torch.cuda.current_device()))(run)


def _eager(call: Call) -> Run:
    call.aggregator.backend = "reference"
    return call


def _autocast(call: Call) -> Run:
    call.aggregator.backend = "reference"

    def run() -> Tensor:
        with tf32(True), torch.autocast(call.img_feats.device.type, torch.bfloat16):
            return call()

    return run


def _compiled(call: Call, mode: str = "default") -> Run:
    """Return the reference in bf16, channels last, with SDPA, compiled."""
    call = call.to(torch.bfloat16)
    aggregator = call.aggregator.to(memory_format=torch.channels_last)
    for module in aggregator.modules():
        if type(module) is WindowAttention:
            module.__class__ = FusedWindowAttention

    def forward(img_feats: Tensor, text_feats: Tensor, guidance: list[Tensor]) -> Tensor:
        return reference.Aggregator.forward(aggregator, img_feats, text_feats, guidance)

    fast = torch.compile(forward, mode=mode, dynamic=False)
    img_feats, *guidance = (x.to(memory_format=torch.channels_last) for x in (call.img_feats, *call.guidance))

    def run() -> Tensor:
        with torch.no_grad():
            return fast(img_feats, call.text_feats, guidance)

    return run


def _autotuned(call: Call) -> Run:
    return _compiled(call, "max-autotune")


def _torch(call: Call) -> Run:
    call.aggregator.backend = "torch"
    return call


def _triton(call: Call) -> Run:
    call.aggregator.backend = "triton"
    return call


def _graphed(call: Call) -> Run:
    call.aggregator.backend = "triton"
    return graphed(call)


_EVERY = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETER = "Triton's interpreter is never timed; a GPU is needed"
BASELINES = (
    Baseline("(a) reference, eager fp32", (torch.float32,), _eager),
    Baseline(
        "(b) reference, TF32 and bf16 autocast", (torch.bfloat16,), _autocast, on_cpu="a CPU has no TF32"
    ),
    Baseline(
        "(c) reference, bf16, channels last, SDPA, compiled",
        (torch.bfloat16,),
        _compiled,
    ),
    Baseline(
        "(c) reference, bf16, channels last, SDPA, max-autotune",
        (torch.bfloat16,),
        _autotuned,
        gpu_only="max-autotune is for GPUs",
    ),
    Baseline("(d) engine, torch", _EVERY, _torch, ours=True),
    Baseline("(e) engine, Triton", _EVERY, _triton, ours=True, gpu_only=_INTERPRETER),
    Baseline(
        "(e) engine, Triton, CUDA graph", _EVERY, _graphed, ours=True, gpu_only="CUDA graphs need a GPU"
    ),
)
