"""Declarations of ops.

An op is a function of tensors and numbers. Its declaration, an `Op`, is read by the tuner, the self check,
the benchmark of kernels, the tests of ops, and the gate that compiles kernels ahead of time.
`catseg_fast.kernels.OPS` lists the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.kernels.launch.capability import assume, capability_of
from catseg_fast.kernels.launch.kernel import Call, record_calls
from catseg_fast.kernels.launch.launcher import Launch, record


@dataclass(frozen=True)
class Sizes:
    """Sizes of an op's arguments; by default those of the published variants for a chunk of 51 classes.

    Attributes:
        crops: B.
        classes: t.
        prompts: P.
        features: F, channels of CLIP's image and text features.
        window, shift: window and shift of window attention, in positions.
        hidden: M, hidden channels of an MLP.
        pooling: rows and columns of positions that become one token of the class attention.
        decoder: output channels of each decoder stage.
        groups: channels per group of the decoder's normalisations.
        guided: whether each crop has guidance of its own; otherwise all crops share it.
        streamed: whether classes come in several chunks, of which this is not the last.
    """

    crops: int = 5
    classes: int = 51
    height: int = 24
    width: int = 24
    channels: int = 128
    heads: int = 4
    window: int = 12
    shift: int = 0
    hidden: int = 512
    features: int = 768
    prompts: int = 1
    pooling: tuple[int, int] = (1, 1)
    decoder: tuple[int, ...] = (64, 32)
    group: int = 16
    guided: bool = True
    streamed: bool = False

    @property
    def resolution(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    @property
    def positions(self) -> int:
        """Positions HW of a crop."""
        return self.height * self.width

    @property
    def state(self) -> tuple[int, int, int, int]:
        """Shape `[B, t, HW, C]` of a chunk's state."""
        return self.crops, self.classes, self.positions, self.channels


class Random:
    """Random tensors of a type on a device; on the meta device, they have only a shape."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normal numbers with a standard deviation of `scale`."""
        return self._draw(torch.randn, shape).mul_(scale).to(self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """Return a weight `[out, …]` that preserves a standard deviation of one."""
        return self.normal(*shape, scale=torch.Size(shape[1:]).numel() ** -0.5)

    def bias(self, size: int) -> Tensor:
        """Return a bias `[size]`."""
        return self.normal(size, scale=0.3)

    def unit(self, *shape: int) -> Tensor:
        """Return unit vectors along the last dimension."""
        return F.normalize(self._draw(torch.randn, shape), dim=-1).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1) in fp32."""
        return self._draw(torch.rand, shape)

    def _draw(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        if self._generator is None:
            return torch.empty(shape, device=self.device)
        return draw(shape, generator=self._generator, device=self.device)


@dataclass(frozen=True)
class Form:
    """One way to compute an op in Triton.

    Attributes:
        launch: calls kernels; takes the op's checked arguments and returns its result.
        unsupported: takes a compute capability (90 for 9.0) and the same arguments; returns why the form
            cannot run because of capability, sizes, or Triton's version (`checks.TRITON`), or None.
    """

    launch: Callable[..., Any]
    unsupported: Callable[..., str | None] = lambda capability, *arguments: None


@dataclass(frozen=True)
class Op:
    """An op's declaration.

    Attributes:
        name: name of the op, also of its file of measured configs, its benchmark and its tests.
        plain: the op in plain torch ops, in any floating type; it has no argument `input_precision`.
        triton: the public function on kernels: it checks arguments, then calls the custom op, whose body is
            `Op.launch`.
        forms: ways to compute the op in Triton; the first one that supports a call is used.
        make_inputs: returns arguments with the shapes and scale of a real call, in the order of the
            signature, without `input_precision`, the last one.
        make_options: returns tensors that the engine passes to `launch` besides, in fp16, from the arguments.
        sizes: sizes of the published variants, by their special property ("" for none).
        special: other sizes that compile to other kernels, by the same key.
        odd: small sizes that fit no tile, for tests.
        mma: matrix instructions that the kernel of a name must compile to in 16-bit types: "mma", or "wgmma"
            (on capability 9.0; "mma" on others). Kernels that are not listed have none.
        max_stack: accepted bytes of stack of the kernel of a name; 0 for kernels that are not listed. Spills
            in a loop are never accepted.
    """

    name: str
    plain: Callable[..., Any]
    triton: Callable[..., Any]
    forms: tuple[Form, ...]
    make_inputs: Callable[[Sizes, Random], dict[str, Any]]
    sizes: Mapping[str, Sizes]
    odd: Sequence[Sizes]
    make_options: Callable[[Mapping[str, Any]], dict[str, Tensor]] = lambda arguments: {}
    special: Mapping[str, Sizes] = field(default_factory=dict)
    mma: Mapping[str, str] = field(default_factory=dict)
    max_stack: Mapping[str, int] = field(default_factory=dict)

    def call(self, custom_op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return `launch(*arguments, **options)`, through the custom op only where PyTorch needs it.

        It does while a graph is traced, and when gradients are recorded, which the custom op refuses. The
        dispatch of a custom op takes as long as a kernel's launch. A custom op takes the options first.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return custom_op(*options.values(), *arguments)
        return self.launch(*arguments, **options)

    def launch(self, *arguments: Any, **options: Any) -> Any:
        """Run the first form that supports the call; the first argument is a tensor on the device.

        `options`, such as a tensor for the result, are passed on to the form.

        Raises:
            ValueError: if no form supports the call; the message has the last form's reason.
        """
        device: torch.device = arguments[0].device
        capability, reason = capability_of(device), None
        for form in self.forms:
            reason = form.unsupported(capability, *arguments)
            if reason is None:
                with _current(device):  # where Triton launches
                    return form.launch(*arguments, **options)
        raise ValueError(f"{self.name}: {reason}")

    def dry_run(
        self,
        sizes: Sizes,
        dtype: torch.dtype,
        input_precision: str,
        capability: int,
        with_options: bool = False,
    ) -> tuple[list[Call], list[Launch]]:
        """Return the calls and launches of kernels on GPUs of a capability, without running them.

        They are those of the engine's call in fp16 if `with_options` is true.
        """
        inputs = self.make_inputs(sizes, Random(dtype, torch.device("meta")))
        with assume(capability), record_calls() as calls, record(execute=False) as launches:
            options = self.make_options(inputs) if with_options else {}
            self.launch(*inputs.values(), input_precision, **options)
        return calls, launches


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a GPU is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
