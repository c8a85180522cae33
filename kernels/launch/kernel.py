"""A kernel as its op calls it: the launch, and the choice of its config."""

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

    A call of it calls `launch`. Inside `record_calls`, the calls of this thread are listed with copies of
    their tensors, so that the tuner times each candidate on an op's real arguments.

    Args:
        launch: `launch(*arguments, config)`, whose first argument is a tensor on the device; returns all
            tensors that it computes or overwrites.
        problem: takes the same arguments without the config; returns the sizes and types by which a measured
            config is found.
        default_config: returns the default config for a compute capability (90 for 9.0) and a problem.
        candidates: returns configs worth timing for these, the default first. Some may not fit the GPU.
        interpreter_config: returns the config for a problem in Triton's interpreter, which is fastest with
            few, large programs; by default the default config.
        compared: takes the results of `launch`; returns the finite values on which correct configs agree, by
            default all results.
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
    """A call of a kernel, with copies of its tensors from before the call."""

    kernel: Kernel[Any]
    problem: Problem
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def copy(self) -> Call:
        """Return the same call with copies of the tensors."""
        options = {name: copy(value) for name, value in self.options.items()}
        return Call(self.kernel, self.problem, tuple(map(copy, self.arguments)), options)

    def run(self, config: LaunchConfig) -> list[Tensor]:
        """Launch the kernel with a config; return the tensors that it computes."""
        result = self.kernel.launch(*self.arguments, **self.options, config=config)
        parts = result if isinstance(result, tuple) else (result,)
        return [part for part in parts if part is not None]

    def compared(self, computed: Sequence[Tensor]) -> list[Tensor]:
        """Return the part of the results of `run` on which correct configs agree."""
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
    """Return a copy of a value with its tensors; sequences of tensors become tuples."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return tuple(map(copy, value))
    return value
