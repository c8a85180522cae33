"""The choice of a launch config: one that was measured on a GPU (`catseg-fast tune`), or a default.

An entry of a file (`config_files.py`) fits a launch of the same kernel with the same `version` (1 by
default), type and sizes. Among several entries, the one with the nearest number of crops times classes is
chosen, by ratio. Files in the user's cache folder take precedence over those of the package. A GPU without an
entry of its own borrows one from another GPU of the same compute capability, whose multiprocessors have the
same registers and shared memory; among several GPUs, from the one with the nearest number of
multiprocessors. If no entry fits, the kernel's default config is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from catseg_fast.kernels.launch import capability, config_files
from catseg_fast.kernels.launch.checks import DTYPES
from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.config_files import FREE_SIZE, config_path, read, slug, user_folder, warn

C = TypeVar("C", bound=LaunchConfig)


class Problem(NamedTuple):
    """A kernel at the sizes of a launch; hashable.

    Attributes:
        op: the op that launches it, which names the file.
        kernel: the kernel's name in that op.
        config: class of the kernel's configs.
        dtype: type of the tensors, "fp16", "bf16" or "fp32".
        precision: precision of products of fp32 numbers; "ieee" for other types.
        sizes: sizes that must be equal for a measured config to fit.
        crops, classes: B and t, which may differ.
    """

    op: str
    kernel: str
    config: type[LaunchConfig]
    dtype: str
    precision: str
    sizes: tuple[tuple[str, int], ...]
    crops: int
    classes: int

    @classmethod
    def of(
        cls,
        op: str,
        kernel: str,
        config: type[LaunchConfig],
        x: Tensor,
        input_precision: str,
        classes: int | None = None,
        **sizes: int,
    ) -> Problem:
        """Return the problem of a launch on `x [B, t, …]`, or on `x [B, …]` and `classes`.

        `input_precision` matters for fp32 only.
        """
        precision = input_precision if x.dtype == torch.float32 else "ieee"
        crops, t = x.shape[0], x.shape[1] if classes is None else classes
        return cls(op, kernel, config, DTYPES[x.dtype], precision, tuple(sizes.items()), crops, t)

    @property
    def crop_classes(self) -> int:
        """Crops times classes."""
        return self.crops * self.classes

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the tensors."""
        return next(dtype for dtype, name in DTYPES.items() if name == self.dtype)

    def size(self, name: str) -> int:
        """Return one of the sizes."""
        return dict(self.sizes)[name]


def choose(
    problem: Problem,
    device: torch.device,
    default_config: Callable[[int, Problem], C],
    interpreter_config: Callable[[Problem], C] | None = None,
) -> C:
    """Return the config of a launch: a measured one on a GPU, or the default of the compute capability.

    Args:
        problem: the problem of the launch.
        device: the device of the tensors, which may not be the current one.
        default_config: returns the default config for a compute capability (90 for 9.0).
        interpreter_config: returns the config for Triton's interpreter, on a CPU; None for the default.
    """
    if device.type == "cuda":
        measured = _measured(problem, device)
        if measured is not None:
            return measured
    elif device.type == "cpu" and interpreter_config is not None:
        return interpreter_config(problem)
    return default_config(capability.capability_of(device), problem)


def origin(problem: Problem, device: torch.device) -> str:
    """Say where the config of a launch on a GPU comes from: measured on it, borrowed, or a default."""
    chip = _chip(device)
    gpus = (e["gpu"] for _, entries in _files(problem.op, device) for e in entries if _serves(e, problem))
    gpu = next(gpus, None)
    if gpu is None:
        return (
            f"defaults (none were measured in {problem.dtype} at compute capability {chip.capability / 10})"
        )
    if slug(gpu) == slug(chip.name):
        return f"measured on {gpu}"
    return f"borrowed from {gpu}, of the same compute capability {chip.capability / 10}"


def clear() -> None:
    """Clear the caches of files and GPUs."""
    for function in (_read_once, _others, _measured, _chip, capability.of_gpu):
        function.cache_clear()


class _Chip(NamedTuple):
    """Properties of a GPU that its configs depend on."""

    name: str
    capability: int  # exact: 90 for 9.0
    multiprocessors: int


_read_once = cache(read)


@cache
def _chip(device: torch.device) -> _Chip:
    found = torch.cuda.get_device_properties(device)
    return _Chip(found.name, 10 * found.major + found.minor, found.multi_processor_count)


def _folders() -> tuple[Path, ...]:
    """Return the user's folder, if there is one, and the package's."""
    try:
        return user_folder(), config_files.SHIPPED
    except RuntimeError as error:
        warn("the user's folder of launch configs", error)
        return (config_files.SHIPPED,)


@cache
def _measured(problem: Problem, device: torch.device) -> Any:
    for path, entries in _files(problem.op, device):
        fitting = [entry for entry in entries if _serves(entry, problem)]
        if not fitting:
            continue
        nearest = min(
            fitting, key=lambda entry: abs(math.log(entry["shape"][FREE_SIZE] / problem.crop_classes))
        )
        try:
            return problem.config(**nearest["config"])
        except (TypeError, ValueError) as error:
            warn(path, error)
    return None


def _files(op: str, device: torch.device) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Yield an op's files and entries in order of precedence for a device: its own, then others'."""
    chip = _chip(device)
    for folder in _folders():
        path = config_path(folder, chip.name, op)
        if entries := _read_once(path, chip.name):
            yield path, entries
    others = [item for folder in _folders() for item in _others(folder, op, chip)]
    for _, path, entries in sorted(others, key=lambda other: other[0]):
        yield path, entries


@cache
def _others(folder: Path, op: str, chip: _Chip) -> tuple[tuple[float, Path, list[dict[str, Any]]], ...]:
    """Return distance, file and entries of each other GPU of the same compute capability in a folder."""
    found = []
    for path in sorted(folder.glob(f"*/{op}.json")):
        if path.parent.name == slug(chip.name):
            continue
        entries = [e for e in _read_once(path, path.parent.name) if e.get("capability") == chip.capability]
        if entries:
            count: Any = entries[0].get("multiprocessors")
            known = isinstance(count, int) and count > 0
            distance = abs(math.log(int(count) / chip.multiprocessors)) if known else math.inf
            found.append((distance, path, entries))
    return tuple(found)


def _serves(entry: dict[str, Any], problem: Problem) -> bool:
    sizes = {name: size for name, size in entry["shape"].items() if name != FREE_SIZE}
    wanted = (problem.kernel, problem.dtype, problem.precision, dict(problem.sizes), problem.config.version)
    return (entry["kernel"], entry["dtype"], entry["precision"], sizes, entry.get("version", 1)) == wanted
