"""Compilation and check of kernels before the first call of its kind on a GPU.

All kernels that the call and the check launch are compiled in parallel. The result of the check is kept in
the user's cache folder, for the same launches, GPU and versions.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

import torch

from catseg_fast._version import __version__
from catseg_fast.console import late_progress
from catseg_fast.engine.compiling import Job, compile_jobs
from catseg_fast.engine.self_check import random_plan, run_stream, wrong_stages
from catseg_fast.engine.terms import ImageTerms
from catseg_fast.engine.triton_stages import TritonStages
from catseg_fast.environment import describe_compiler
from catseg_fast.files import user_cache, write_text
from catseg_fast.kernels.launch.launcher import record


def get_ready(
    stages: TritonStages, image: ImageTerms, direct: bool, call: Callable[[], object] | None
) -> None:
    """Compile the kernels of a call, and compare them with torch; stages that differ then run in torch.

    Args:
        stages: stages of the call.
        image: image terms of the call.
        direct: whether the call convolves the cost volume directly, not in the Fourier domain.
        call: runs the call's stages. Kernels are not launched while it does, so its results are arbitrary.
            None compiles only the kernels of the check.
    """
    kind = (image.crops, image.resolution, direct)
    if kind in stages.ready:
        return
    stages.ready.add(kind)
    device = image.features.device
    candidate = TritonStages(random_plan(stages.plan), stages.input_precision)
    with record(execute=False, note=Job.of) as checked:
        run_stream(candidate, candidate.plan, image, direct)
    with record(execute=False, note=Job.of) as called:
        if call is not None:
            call()
    file = _file(checked, device)
    passed = _has_passed(file)
    with late_progress("Compiling kernels") as bar:
        compile_jobs([*called, *(() if passed else checked)], device, advance=bar)
    if passed:
        return
    before = set(candidate.fallbacks)
    wrong = wrong_stages(candidate, image, direct)
    for stage, reason in wrong.items():
        stages.fall_back(stage, f"its result differs from torch's on this GPU: {reason}")
    for stage in candidate.fallbacks.keys() - before:  # the candidate has warned
        stages.fallbacks[stage] = candidate.fallbacks[stage]
    if not wrong and candidate.fallbacks.keys() == before:
        _remember(file, device)


def _file(jobs: Iterable[Job], device: torch.device) -> Path:
    """Return the file that records that some launches passed the check, on a GPU with certain software."""
    different = set(jobs)
    sources = {job.name: getattr(job.kernel, "cache_key", "") for job in different}
    facts = (sorted(map(repr, different)), sorted(sources.items()), _versions(device))
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return user_cache() / "self-check" / f"{name}.json"


def _versions(device: torch.device) -> dict[str, str]:
    found = {"catseg_fast": __version__, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "compiler": describe_compiler(device)}
    return found


def _has_passed(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["passed"])
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{file} is damaged; the kernels are checked again: {error}", stacklevel=2)
        return False


def _remember(file: Path, device: torch.device) -> None:
    content = {"passed": datetime.now(timezone.utc).isoformat(), **_versions(device)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content))
    except OSError as error:
        warnings.warn(
            f"{file.parent}: cannot record that the kernels passed their check: {error}", stacklevel=2
        )
