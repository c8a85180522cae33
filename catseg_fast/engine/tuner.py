"""Timing of launch configs on a GPU; the fastest are saved in files of `kernels/launch/config_files.py`."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from catseg_fast._version import __version__
from catseg_fast.engine import fourier
from catseg_fast.engine.schedule import usual_chunk
from catseg_fast.errors import InputError
from catseg_fast.files import locked, write_text
from catseg_fast.kernels import load
from catseg_fast.kernels.launch import config_files, configs
from catseg_fast.kernels.launch.capability import capability_of
from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.kernel import Call, record_calls
from catseg_fast.kernels.launch.op import Op, Random, Sizes

TIMED = (5, 25)  # milliseconds of warm-up and of timing per config: 90 configs take 35 s
# Returns the milliseconds that a call takes.
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Tunable:
    """A kernel at certain sizes, and its configs that are worth timing.

    Attributes:
        problem: sizes and types by which a measured config is found.
        candidates: configs, the default first. Some may not fit the GPU.
        make_inputs: makes the kernel's call in its op on a device, with random tensors of realistic scale.
        run: launches the kernel of such a call with a config, and returns its results. It may overwrite the
            call's tensors, but only with values that do not change its time.
    """

    problem: Problem
    candidates: tuple[LaunchConfig, ...]
    make_inputs: Callable[[torch.device], Call]
    run: Callable[[Call, Any], Sequence[Tensor]] = Call.run


@dataclass
class Outcome:
    """Result of timing a kernel's candidates.

    Attributes:
        tunable: the kernel.
        milliseconds: time of each config that ran and gave the right result.
        failed: number of configs that did not compile, or needed more than the GPU has.
        wrong: configs whose results differ from the default's.
        reason: why the default config does not work, if so; then nothing was timed.
        unsaved: why the fastest config could not be written, if so.
    """

    tunable: Tunable
    milliseconds: dict[LaunchConfig, float] = field(default_factory=dict)
    failed: int = 0
    wrong: list[LaunchConfig] = field(default_factory=list)
    reason: str | None = None
    unsaved: str | None = None

    @property
    def default_milliseconds(self) -> float:
        """Time of the default config."""
        return self.milliseconds[self.tunable.candidates[0]]

    @property
    def best(self) -> LaunchConfig:
        """The fastest config."""
        return min(self.milliseconds, key=self.milliseconds.__getitem__)

    def entry(self, gpu: str, **facts: int) -> dict[str, Any]:
        """Return the fastest config as an entry of a file, with everything that its time depends on."""
        problem = self.tunable.problem
        return {
            "kernel": problem.kernel,
            "version": problem.config.version,
            "dtype": problem.dtype,
            "precision": problem.precision,
            "shape": {**dict(problem.sizes), config_files.FREE_SIZE: problem.crop_classes},
            "config": asdict(self.best),
            "milliseconds": round(self.milliseconds[self.best], 5),
            "default_milliseconds": round(self.default_milliseconds, 5),
            "gpu": gpu,
            **facts,
            "triton": triton.__version__,
            "torch": torch.__version__,
            "catseg_fast": __version__,
            "date": datetime.now(timezone.utc).date().isoformat(),
        }


def list_tunables(
    ops: Sequence[str], dtype: torch.dtype, classes: Sequence[int], crops: int, device: torch.device
) -> list[Tunable]:
    """Return the kernels of some ops in the launches for vocabularies of these sizes, without duplicates.

    Products of fp32 numbers are timed with both "ieee" and "tf32x3".
    """
    found: dict[Problem, Tunable] = {}
    for chunk in (usual_chunk(count, crops, device) for count in classes):
        for precision in ("ieee", "tf32x3") if dtype == torch.float32 else ("ieee",):
            for op in map(load, ops):
                for published in op.sizes.values():
                    if fourier.is_less_work(published.prompts, crops * chunk):
                        continue  # no kernel supports such a call
                    sizes = replace(published, crops=crops, classes=chunk)
                    for tunable in tunables(op, sizes, dtype, precision, capability_of(device)):
                        found[tunable.problem] = tunable
    return list(found.values())


def tunables(
    op: Op, sizes: Sizes, dtype: torch.dtype, input_precision: str, capability: int
) -> list[Tunable]:
    """Return the kernels that an op calls at some sizes on GPUs of a compute capability."""
    calls, _ = op.dry_run(sizes, dtype, input_precision, capability)

    def make_inputs(problem: Problem, device: torch.device) -> Call:
        inputs = op.make_inputs(sizes, Random(dtype, device))
        with record_calls() as recorded:
            op.launch(*inputs.values(), input_precision)
        return next(call for call in recorded if call.problem == problem)

    return [
        Tunable(
            call.problem,
            call.kernel.candidates(capability, call.problem),
            functools.partial(make_inputs, call.problem),
        )
        for call in calls
    ]


def tune_all(
    tunables: Sequence[Tunable],
    device: torch.device,
    gpu: str,
    folder: Path,
    *,
    timer: Timer,
    seconds: float = math.inf,
    advance: Callable[[], object] = lambda: None,
) -> Iterator[Outcome]:
    """Time kernels one by one; each outcome is written to its file before it is yielded.

    Args:
        tunables: the kernels.
        device: device on which they run.
        gpu: name of the device.
        folder: folder of the files, such as `config_files.user_folder()`.
        timer: measures a call.
        seconds: time limit; a kernel that is not finished by then is skipped. With a limit, kernels are timed
            in descending order of the time of their default configs.
        advance: called after each candidate.
    """
    deadline = time.monotonic() + seconds
    for tunable in tunables if math.isinf(seconds) else slowest_first(tunables, device, timer, deadline):
        outcome = tune(tunable, device, timer, deadline, advance)
        if outcome is None:
            return
        if outcome.reason is None:
            path = config_files.config_path(folder, gpu, tunable.problem.op)
            try:
                save(path, gpu, outcome.entry(gpu, **_facts(device)))
            except OSError as error:
                outcome.unsaved = f"{path} cannot be written: {error}"
        yield outcome


def slowest_first(
    tunables: Sequence[Tunable], device: torch.device, timer: Timer, deadline: float = math.inf
) -> list[Tunable]:
    """Sort kernels by the time of their default configs; those that fail or are not timed come last."""

    def milliseconds(tunable: Tunable) -> float:
        if time.monotonic() >= deadline:
            return 0.0
        inputs = tunable.make_inputs(device)
        try:
            tunable.run(inputs, tunable.candidates[0])
            return timer(functools.partial(tunable.run, inputs, tunable.candidates[0]))
        except torch.AcceleratorError:
            raise
        except Exception:  # `tune` reports it
            return 0.0

    return sorted(tunables, key=milliseconds, reverse=True)


def _facts(device: torch.device) -> dict[str, int]:
    """Return the properties that decide which GPUs may borrow a config of this one."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "capability": 10 * found.major + found.minor,
        "multiprocessors": found.multi_processor_count,
    }


def tune(
    tunable: Tunable,
    device: torch.device,
    timer: Timer,
    deadline: float = math.inf,
    advance: Callable[[], object] = lambda: None,
) -> Outcome | None:
    """Time a kernel's candidates; return None if `deadline` (of `time.monotonic()`) passes before the end."""
    torch.manual_seed(0)
    outcome, expected = Outcome(tunable), None
    inputs = tunable.make_inputs(device)
    scratch = inputs.copy()  # a kernel may overwrite its inputs
    for config in tunable.candidates:
        if time.monotonic() >= deadline:
            return None
        try:
            result = inputs.compared(tunable.run(inputs.copy(), config))
            if expected is None:
                expected = result
                if not all(x.isfinite().all() for x in expected):
                    raise InputError("its results are infinite or NaN")
            if _agree(result, expected, _rounding(tunable)):
                outcome.milliseconds[config] = timer(functools.partial(tunable.run, scratch, config))
            else:
                outcome.wrong.append(config)
        except torch.AcceleratorError:  # the process cannot use the GPU any more
            raise
        except Exception as error:  # any error of the compiler or the driver
            if not outcome.milliseconds:
                outcome.reason = f"the default config does not run: {error}"
                return outcome
            outcome.failed += 1
        advance()
    return outcome


def median_milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call on the current GPU, with an empty cache."""
    from triton.testing import do_bench

    median: float = do_bench(call, *TIMED, return_mode="median")
    return median


def save(path: Path, gpu: str, entry: dict[str, Any]) -> None:
    """Add an entry to a file, replacing the one of the same launch; safe for concurrent processes.

    The file is replaced atomically.
    """
    launch = ("kernel", "dtype", "precision", "shape")  # any version, as old ones are of no use
    with locked(path):
        others = [
            old for old in config_files.read(path, gpu) if any(old[name] != entry[name] for name in launch)
        ]
        text = ",\n".join(json.dumps(item) for item in [*others, entry])
        write_text(path, f"[\n{text}\n]\n")
    configs.clear()


def _agree(result: Sequence[Tensor], expected: Sequence[Tensor], rounding: float) -> bool:
    """Check whether tensors are equal but for the order of sums and a few roundings of the largest value."""
    return all(
        bool((ours.float() - theirs.float()).abs().max() <= rounding * theirs.float().abs().max())
        for ours, theirs in zip(result, expected, strict=True)
    )


def _rounding(tunable: Tunable) -> float:
    """Return the largest accepted difference of two configs, relative to the largest value."""
    return 4 * torch.finfo(tunable.problem.torch_dtype).eps + 64 * torch.finfo(torch.float32).eps
