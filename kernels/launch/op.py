"""What an op declares of itself, once, for all that need to know it.

An op is a function of tensors and numbers. Its declaration, an `Op`, is read by the tuner, by the self check,
by the benchmark of kernels, by the tests of ops, and by the gate that compiles kernels ahead of time.
`catseg_fast.kernels.OPS` lists the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """Sizes of an op's arguments; by default those of the published variants, and a chunk of 51 classes.

    Attributes:
        crops: B.
        classes: t.
        prompts: P.
        features: F, of CLIP's image and text features.
        window, shift: of window attention, in positions.
        hidden: M, of an MLP.
        pooling: positions down and across that become one token of the class attention.
        decoder: output channels of each decoder stage.
        groups: of the decoder's normalisations, in channels.
        guided: whether each crop has guidance of its own; else one serves all.
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
    """Random tensors of a type on a device; on the meta device, of a shape only."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of a standard deviation of `scale`."""
        return self._draw(torch.randn, shape).mul_(scale).to(self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """A weight `[out, …]` that keeps a standard deviation of one."""
        return self.normal(*shape, scale=torch.Size(shape[1:]).numel() ** -0.5)

    def bias(self, size: int) -> Tensor:
        """A bias `[size]`."""
        return self.normal(size, scale=0.3)

    def unit(self, *shape: int) -> Tensor:
        """Unit vectors along the last dimension."""
        return F.normalize(self._draw(torch.randn, shape), dim=-1).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) in fp32."""
        return self._draw(torch.rand, shape)

    def _draw(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        if self._generator is None:
            return torch.empty(shape, device=self.device)
        return draw(shape, generator=self._generator, device=self.device)


@dataclass(frozen=True)
class Form:
    """One way to compute an op in Triton.

    Attributes:
        launch: calls kernels; takes the op's arguments, checked, and returns its result.
        unsupported: takes a compute capability (as 80, 86, 89, 90, 100) and the same arguments; returns why
            the form cannot run, for capability, sizes, or Triton's version (`checks.TRITON`), or None.
    """

    launch: Callable[..., Any]
    unsupported: Callable[..., str | None] = lambda capability, *arguments: None


@dataclass(frozen=True)
class Op:
    """An op's declaration.

    Attributes:
        name: names the file of measured configs, the benchmark and the tests.
        plain: the op in plain torch ops, readable, in any floating type; `input_precision` is not among its
            arguments.
        triton: the public function, on kernels: checks arguments, then calls the custom op, whose body is
            `Op.launch`.
        forms: ways to compute it in Triton; the first that supports a call runs.
        make_inputs: arguments of a real call's shapes and scale, in the order of the signature, without
            `input_precision`, which is the last.
        sizes: of the published variants, by what is special about them ("" for nothing).
        special: other sizes that compile to other kernels, in the same way.
        odd: small sizes that fit no tile, for tests.
        mma: matrix instructions that a kernel of this name must compile to in 16-bit types: "wgmma" (on
            capability 90; "mma" on others) or "mma"; kernels that are not listed have none.
        max_stack: bytes of stack that are accepted of a kernel of this name; 0 where it is not listed. They
            may hold spills outside loops only: spills in a loop never pass.
    """

    name: str
    plain: Callable[..., Any]
    triton: Callable[..., Any]
    forms: tuple[Form, ...]
    make_inputs: Callable[[Sizes, Random], dict[str, Any]]
    sizes: Mapping[str, Sizes]
    odd: Sequence[Sizes]
    special: Mapping[str, Sizes] = field(default_factory=dict)
    mma: Mapping[str, str] = field(default_factory=dict)
    max_stack: Mapping[str, int] = field(default_factory=dict)

    def call(self, custom_op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return `launch(*arguments, **options)`, through the custom op only where PyTorch needs to see it.

        That is while a graph is traced, and where gradients are recorded, which the custom op refuses; its
        dispatch takes as long as a kernel's launch. A custom op takes the options first.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return custom_op(*options.values(), *arguments)
        return self.launch(*arguments, **options)

    def launch(self, *arguments: Any, **options: Any) -> Any:
        """Run the first form that supports the call; the first argument is a tensor on the device.

        `options` are passed on to the form: where the result goes, for instance.

        Raises:
            ValueError: if none does; the message has the last one's reason.
        """
        capability, reason = capability_of(arguments[0].device), None
        for form in self.forms:
            reason = form.unsupported(capability, *arguments)
            if reason is None:
                return form.launch(*arguments, **options)
        raise ValueError(f"{self.name}: {reason}")

    def dry_run(
        self, sizes: Sizes, dtype: torch.dtype, input_precision: str, capability: int
    ) -> tuple[list[Call], list[Launch]]:
        """Calls of kernels and their launches on GPUs of a capability; nothing runs or takes memory."""
        inputs = self.make_inputs(sizes, Random(dtype, torch.device("meta")))
        with assume(capability), record_calls() as calls, record(execute=False) as launches:
            self.launch(*inputs.values(), input_precision)
        return calls, launches
