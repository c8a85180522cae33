"""The base class of an aggregator's parts that run in the engine separately."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from catseg_fast import reference
from catseg_fast.acceleration import trial
from catseg_fast.acceleration.comparing import differs, differs_in_16_bits
from catseg_fast.acceleration.part import Inputs, Part
from catseg_fast.acceleration.trial import Factors, Random, Resolution
from catseg_fast.acceleration.whole import in_full_precision
from catseg_fast.backend import choose_backend
from catseg_fast.engine import torch_stages
from catseg_fast.engine.folding import Plan, build_plan
from catseg_fast.engine.precision import compute_dtype
from catseg_fast.engine.schedule import usual_chunk
from catseg_fast.engine.stages import Stages


class Piece(Part):
    """A part of an aggregator whose input is the state of all classes, `[B, C, T, H, W]`."""

    arguments: tuple[str, str] = ("x", "guidance")

    def __init__(self, module: nn.Module, name: str, verify: bool = True, backend: str = "auto") -> None:
        super().__init__(module, name, verify)
        self.backend = backend
        self._twin: nn.Module | None = None
        self._plans: dict[torch.dtype, tuple[Plan, Stages]] = {}

    def read(self) -> None:
        self._twin = self.read_twin(self.module)
        self._plans.clear()

    @abstractmethod
    def read_twin(self, module: nn.Module) -> nn.Module:
        """Return an aggregator in which this part is read from a module, and others are idle."""

    @abstractmethod
    def compute(self, plan: Plan, stages: Stages, x: Tensor, guidance: Any) -> Tensor:
        """Return the engine's answer for a state, in the type of the plan."""

    @abstractmethod
    def make_inputs(
        self, module: Any, size: Resolution | None, random: Random, classes: int, factors: Factors
    ) -> tuple[Any, ...]:
        """Return random arguments of the module's method."""

    def check_code(self) -> None:
        def prepare(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
            return functools.partial(self.compute, build_plan(self.read_twin(module), dtype), torch_stages)

        trial.check_code(self.copied(), self.make_inputs, prepare, self.method)

    def copied(self) -> nn.Module:
        """Return what is copied for a trial."""
        return self.module

    def settings(self) -> object:
        return self.backend

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Inputs | None:
        if len(args) + len(kwargs) != 2 or not args:
            return None
        x = args[0]
        guidance = args[1] if len(args) == 2 else next(iter(kwargs.values()))
        if kwargs and next(iter(kwargs)) not in self.arguments:
            return None
        return (x, guidance) if isinstance(x, Tensor) and x.ndim == 5 and x.numel() else None

    def run(self, inputs: Inputs) -> Tensor:
        x, guidance = inputs
        plan, stages = self._prepared()
        with torch.autocast(x.device.type, enabled=False):
            return self.compute(plan, stages, x, guidance)

    def compare(self, args: Sequence[Any], kwargs: dict[str, Any], inputs: Inputs) -> tuple[Any, str | None]:
        own = self.own(args, kwargs)
        try:
            ours = self.run(inputs)
        except Exception as error:  # the engine must never be the reason why a model does not run
            return own, f"the engine fails: {type(error).__name__}: {error}"
        if self._prepared()[0].embed.itemsize >= 4 and own.itemsize >= 4:
            return own, differs(ours, own)
        truth = in_full_precision(self.module, args, kwargs, self.method)
        return own, differs_in_16_bits(ours, own, truth)

    def _prepared(self) -> tuple[Plan, Stages]:
        assert self._twin is not None
        weight = self._twin.get_parameter("conv1.weight")
        dtype = compute_dtype(None, weight)
        if weight.dtype == torch.float32 and not torch.is_autocast_enabled(weight.device.type):
            dtype = torch.float32  # on a GPU, too: what surrounds the part computes in fp32
        if dtype not in self._plans:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(weight.device.type, enabled=False),
            ):
                plan = build_plan(self._twin, dtype)
            stages: Any = torch_stages
            chosen = choose_backend(self.backend, weight.device)
            if chosen == "triton" and (dtype.itemsize == 2 or self.backend == "triton"):
                from catseg_fast.engine.triton_stages import TritonStages  # triton exists for Linux only

                stages = TritonStages(plan)
            self._plans[dtype] = (plan, stages)
        return self._plans[dtype]


def by_chunks(plan: Plan, x: Tensor, step: Callable[[Tensor, slice], Tensor | None]) -> Tensor:
    """Run a step on chunks of a state's classes.

    Returns:
        The results: states `[B, C, T, H, W]`, or logits `[B, T, H, W]`; the state itself if there are none.
    """
    B, C, T, H, W = x.shape
    state = x.permute(0, 2, 3, 4, 1).reshape(B, T, H * W, C).to(plan.embed.dtype)
    count, parts = usual_chunk(T, B, x.device), []
    for start in range(0, T, count):
        classes = slice(start, min(start + count, T))
        part = step(state[:, classes], classes)
        if part is not None:
            parts.append(part)
    if not parts:
        return state.view(B, T, H, W, C).permute(0, 4, 1, 2, 3)
    result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if result.shape[2:] != (H * W, C):
        return result
    return result.view(B, T, H, W, C).permute(0, 4, 1, 2, 3)


def one_part(windows: Any = None, classes: Any = None, decoder: Any = None) -> nn.Module:
    """An aggregator of one part; the others, which are not run, are as small as can be."""
    part = windows if windows is not None else classes if classes is not None else decoder[0]
    weight = next(part.parameters())
    options = {"device": weight.device, "dtype": weight.dtype}
    with torch.device(weight.device):
        twin: Any = nn.Module()
        if decoder is None:
            channels = windows.block_1.dim if windows is not None else classes.attention.v.in_features
            pair: Any = nn.Module()
            pair.swin_block = windows
            pair.attention = classes
            if windows is None:
                heads = classes.attention.nheads
                pair.swin_block = reference.SwinTransformerBlockWrapper(channels, 0, (2, 2), heads, 2)
            if classes is None:
                pair.attention = reference.ClassTransformerLayer(channels, 0, 1, pooling_size=None, pad_len=0)
            twin.layers = nn.ModuleList([pair])
            decoder = (reference.Up(channels, 16, 0), reference.Up(16, 16, 0), nn.Conv2d(16, 1, 3, padding=1))
        else:
            channels = decoder[0].up.in_channels
            twin.layers = nn.ModuleList()
        twin.decoder1, twin.decoder2, twin.head = decoder
        twin.conv1 = nn.Conv2d(1, channels, 7, padding=3).to(**options)
    return twin
