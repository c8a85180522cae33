"""The steps of a campaign, the most valuable first."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench import records
from bench.runner import Step

HEADLINES = ("ours", "upstream", "compiled", "best256")  # of bench_headline.py
BENCHMARKS = ("kernels", "ablation", "label_map", "scaling", "model", "aggregator")  # the longest ones last
CPU_BENCHMARKS = (*BENCHMARKS, "engine")
PROFILED = 3
TUNED = {"fp16": 0.1, "bf16": 0.1, "fp32": 0.05}  # shares of the time
LONGEST = {"compile": 0.25, "checks": 0.3, "headline-compiled": 0.25, "model": 0.25}  # shares, too
PROFILE_MINUTES = 20  # Nsight Compute takes 20 s per stage
WORKERS = 7  # of checks in parallel
FIRST_CHECKS = "150 or 1203"
MODEL = {"cuda": "v2-vitl-fp16 or (v2-vitl-fp32 and reference)", "cpu": "v2-vitb-fp32"}


def all_steps(device: str, folder: Path, minutes: float, workers: int = 0) -> Iterator[Step]:
    """Yield the steps; profiles come as soon as the slowest kernels are known.

    Args:
        device: "cuda", or "cpu" for those steps that can run on a CPU.
        folder: folder of the results.
        minutes: time for all steps.
        workers: processes in which the checks run; 0 for this one only.
    """
    for step in (*first_steps(device, folder, minutes, workers), *other_steps(device, folder, minutes)):
        yield step
        if step.name == "bench-kernels":
            yield from profiling_steps(device, folder, minutes)


def first_steps(device: str, folder: Path, minutes: float, workers: int = 0) -> list[Step]:
    """Return checks, the quoted figures, and the tuning of the slowest kernels: a short campaign."""
    python, gpu = sys.executable, device == "cuda"
    own = 0.9 * LONGEST["compile"] * 60 * minutes  # so that it ends by itself
    compile_all = (python, "-m", "bench.compile_all", "--seconds", f"{own:g}")
    steps = [
        _step("environment", (python, "-m", "catseg_fast", "env"), device, folder, per_machine=True),
        _step("compile", compile_all, device, folder, minutes, per_machine=True)
        if gpu
        else Step("compile", reason="there is no GPU to compile for"),
        _checks(device, folder, minutes, workers),
    ]
    for name in HEADLINES:
        steps.append(_benchmark(f"headline-{name}", "headline", device, folder, minutes, name))
    steps.append(_benchmark("model", "model", device, folder, minutes, MODEL[device]))
    return [*steps, _tuning("fp16", device, folder, minutes)]


def other_steps(device: str, folder: Path, minutes: float) -> list[Step]:
    """Return the rest: every check, the other types, every benchmark."""
    python, gpu = sys.executable, device == "cuda"
    every_check = (python, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors", "tests")
    steps = [_step("checks-all", every_check, device, folder)] if gpu else []
    steps += [_tuning(dtype, device, folder, minutes) for dtype in TUNED if dtype != "fp16"]
    names = BENCHMARKS if gpu else CPU_BENCHMARKS
    return [*steps, *(_benchmark(f"bench-{name}", name, device, folder, minutes) for name in names)]


def profiling_steps(device: str, folder: Path, minutes: float) -> list[Step]:
    """Return a profile of each of the slowest kernels in bf16, by Nsight Compute or by torch."""
    if minutes <= PROFILE_MINUTES:
        return [Step("profile", reason=f"is for campaigns of more than {PROFILE_MINUTES} minutes")]
    path, run = folder / "kernels.jsonl", "Triton" if device == "cuda" else "torch"
    measured = records.read([path]) if path.exists() else []
    measured = [record for record in measured if record.run == run and record.case.endswith("bf16")]
    if not measured:
        return [Step("profile", reason="no kernel was measured")]
    ncu = shutil.which("ncu") if device == "cuda" else None
    profiler = (ncu, "--set", "full", "--profile-from-start", "off") if ncu else ()
    steps = []
    for record in sorted(measured, key=lambda record: -record.median)[:PROFILED]:
        command = (*profiler, sys.executable, "-m", "bench.run_stage", record.case, "--device", device)
        name = "profile-" + re.sub(r"\W+", "-", record.case)
        command = command if ncu else (*command, "--torch")
        steps.append(_step(name, command, device, folder))
    return steps


def _checks(device: str, folder: Path, minutes: float, workers: int) -> Step:
    """Return the checks of kernels; in parallel without the caching allocator, whose pools would not fit."""
    gpu = device == "cuda"
    command = [sys.executable, "-m", "pytest", "-m", "gpu" if gpu else "not gpu", "tests/test_real_shapes.py"]
    command += ["-k", FIRST_CHECKS] if gpu else []
    variables = {}
    if workers and find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "worksteal"]
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return _step("checks", tuple(command), device, folder, minutes, variables=variables)


def _benchmark(name: str, file: str, device: str, folder: Path, minutes: float, picked: str = "") -> Step:
    command = (
        sys.executable, "-m", "pytest", f"bench/bench_{file}.py", "--benchmark-only",
        "--records", str(folder.resolve() / f"{file}.jsonl"),
    )  # fmt: skip
    return _step(name, (*command, "-k", picked) if picked else command, device, folder, minutes)


def _tuning(dtype: str, device: str, folder: Path, minutes: float) -> Step:
    name, own = f"tune-{dtype}", TUNED[dtype] * minutes
    if device != "cuda":
        return Step(name, reason="there is no GPU to tune for")
    command = (sys.executable, "-m", "catseg_fast", "tune", "--dtype", dtype, "--minutes", f"{own:g}")
    return _step(name, command, device, folder)


def _step(
    name: str,
    command: tuple[str, ...],
    device: str,
    folder: Path,
    minutes: float | None = None,
    *,
    per_machine: bool = False,
    variables: dict[str, str] | None = None,
) -> Step:
    """Return a step, with a limit of its own if it has a share of the time.

    The kernels find tuned configs in the folder; a stage that no kernel runs is an error.
    """
    environment = {"XDG_CACHE_HOME": str(folder.resolve() / "cache"), "CATSEG_FAST_STRICT": "1"}
    if device != "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment |= variables or {}
    share = None if minutes is None else LONGEST.get(name)
    seconds = None if share is None or minutes is None else 60 * minutes * share
    return Step(name, command, environment=environment, seconds=seconds, per_machine=per_machine)
