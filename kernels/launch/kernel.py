"""A kernel as its op calls it: the launch, and which config it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from catseg_fast.kernels.launch import configs
from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.configs import Problem

C = TypeVar("C", bound=LaunchConfig)


class Kernel(Generic[C]):
    """A kernel whose config is chosen at each call: a measured one, or the default.

    Calling it calls `launch`. Inside `record_calls` the calls of this thread are listed, with copies of their
    tensors: the tuner times each candidate on what an op really passes.

    Args:
        launch: `launch(*arguments, config)`, the first argument being a tensor on the device; returns what
            it computes, tensors that it overwrites included.
        problem: takes the same arguments without the config; says what a measured config is found by.
        default_config: for a compute capability (as 80, 86, 89, 90, 100) and a problem.
        candidates: configs worth timing for the same, the default first. Not all need to fit the GPU.
        interpreter_config: for a problem in Triton's interpreter, which likes few and large programs; without
            it, the default.
        compared: takes what `launch` computes; returns what right configs agree on, which is finite. Without
            it, that is all of it.
    """

    def __init__(
        self,
        launch: Callable[..., Any],
        problem: Callable[..., Problem],
        default_config: Callable[[int, Problem], C],
        candidates: Callable[[int, Problem], tuple[C, ...]],
        interpreter_config: Callable[[Problem], C] | None = None,
        compared: Callable[..., Tensor] | None = None,
    ) -> None:
        self.launch, self.problem = launch, problem
        self.default_config, self.candidates = default_config, candidates
        self.interpreter_config, self.compared = interpreter_config, compared

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        problem = self.problem(*arguments, **options)
        device = arguments[0].device
        config = configs.choose(problem, device, self.default_config, self.interpreter_config)
        if _recorder.calls is not None:
            copied = {name: copy(value) for name, value in options.items()}
            _recorder.calls.append(Call(self, problem, tuple(map(copy, arguments)), copied))
        return self.launch(*arguments, **options, config=config)


@dataclass(frozen=True)
class Call:
    """One call of a kernel, with copies of its tensors as they were before."""

    kernel: Kernel[Any]
    problem: Problem
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def copy(self) -> Call:
        """The same call on tensors of its own."""
        options = {name: copy(value) for name, value in self.options.items()}
        return Call(self.kernel, self.problem, tuple(map(copy, self.arguments)), options)

    def run(self, config: LaunchConfig) -> list[Tensor]:
        """Launch the kernel with a config; return the tensors that it computes."""
        result = self.kernel.launch(*self.arguments, **self.options, config=config)
        parts = result if isinstance(result, tuple) else (result,)
        return [part for part in parts if part is not None]

    def compared(self, computed: Sequence[Tensor]) -> list[Tensor]:
        """Return what right configs agree on of what `run` computed."""
        return list(computed) if self.kernel.compared is None else [self.kernel.compared(*computed)]


class _Recorder(threading.local):
    calls: list[Call] | None = None


_recorder = _Recorder()


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """List the calls of kernels in this thread."""
    calls: list[Call] = []
    before, _recorder.calls = _recorder.calls, calls
    try:
        yield calls
    finally:
        _recorder.calls = before


def copy(value: Any) -> Any:
    """A value with tensors of its own; sequences and tuples of tensors become tuples."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return tuple(map(copy, value))
    return value
