"""Kernels that are compiled in parallel before a campaign, and are found by launches afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compile_all

TESTS = Path(__file__).parent

# Without the interpreter, whose kernels do not compile.
PREFIX = f"""
import json, os, sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
import torch
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock
from triton.runtime.jit import JITFunction
from bench import compile_all
from catseg_fast.kernels.launch.launcher import record
from catseg_fast.engine import tuner
from catseg_fast.kernels import load
from support import no_gpu_driver
"""
LISTS = (
    PREFIX
    + """
device = torch.device("cpu")
found = {}
for dtype in compile_all.DTYPES:
    by_ops = [compile_all.Job.of(launch) for launch in compile_all.op_launches(dtype, device)]
    candidates = [compile_all.Job.of(launch) for launch in compile_all.candidate_launches(dtype, device)]
    names = [sorted({job.name for job in jobs}) for jobs in (by_ops, candidates)]
    found[str(dtype)] = [len(set(by_ops)), len(candidates), len(set(candidates)), *names]
found["all"] = len(compile_all.all_jobs(device))
print(json.dumps(found))
"""
)
COMPILES = (
    PREFIX
    + """
if __name__ == "__main__":
    device = torch.device("cpu")
    tunable = next(
        tunable for tunable in tuner.list_tunables(["window_block"], torch.float16, [51], 5, device)
        if tunable.problem.kernel == "qkv"
    )
    small = [next(config for config in tunable.candidates if config.tma == tma) for tma in (True, False)]
    with record(execute=False) as launches:
        call = tunable.make_inputs(torch.device("meta"))
        launches.clear()
        for config in small:
            tunable.run(call, config)
    jobs = list(map(compile_all.Job.of, launches))
    assert any(hasattr(argument, "make") for argument in jobs[0].arguments)
    broken = replace(jobs[0], options=(*jobs[0].options[:-1], ("num_warps", 3)))
    cubins = lambda: len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))
    report = compile_all.compile_all([*jobs, broken], 2, start=no_gpu_driver.activate)
    once = cubins()
    compile_all.compile_all(jobs, 2, start=no_gpu_driver.activate)
    no_gpu_driver.activate()
    with record(execute=False):
        real, launch = tunable.make_inputs(device), JITFunction.run  # whose tensors are real
    def compiles(kernel, *arguments, grid, warmup, **options):
        return launch(kernel, *arguments, grid=grid, warmup=True, **options)
    with mock.patch.object(JITFunction, "run", compiles):
        for config in small:
            tunable.run(real, config)
    print(json.dumps([len(jobs), report.compiled, list(report.failed.values()), report.left, once, cubins()]))
"""
)
HANGS = (
    PREFIX
    + """
import time
from dataclasses import dataclass

@dataclass(frozen=True)
class Hanging(compile_all.Job):
    def compile(self):
        time.sleep(600)

if __name__ == "__main__":
    jobs = [Hanging("a module", "a kernel", (number,), ()) for number in range(9)]
    start = time.monotonic()
    report = compile_all.compile_all(jobs, 2, 10.0)
    print(json.dumps([report.compiled, report.left, time.monotonic() - start]))
"""
)


def run(code: str, folder: Path) -> object:
    path = folder / "program.py"
    path.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(path)],
        env={**environment, "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_candidate_is_listed_once_without_a_gpu(tmp_path: Path) -> None:
    found = run(LISTS, tmp_path)
    assert isinstance(found, dict)
    everything = found.pop("all")
    assert everything > sum(different for _, _, different, _, _ in found.values()) - 100
    for of_ops, candidates, different, names, tuned in found.values():
        assert of_ops > 10
        assert candidates >= different > 150  # some differ only in fields that the kernel ignores
        assert set(tuned) < set(names)


def test_a_launch_finds_what_was_compiled_side_by_side(tmp_path: Path) -> None:
    jobs, compiled, failed, left, once, twice = run(COMPILES, tmp_path)  # type: ignore[misc]
    assert (jobs, compiled, left) == (2, 2, 0)
    (reason,) = failed
    assert "num_warps" in reason
    assert once == twice == 2


def test_a_kernel_that_compiles_for_minutes_holds_nothing_up(tmp_path: Path) -> None:
    compiled, left, seconds = run(HANGS, tmp_path)  # type: ignore[misc]
    assert (compiled, left) == (0, 9)
    assert seconds < 60


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        compile_all.main([])
    assert "needs a CUDA GPU to compile for; found none" in capsys.readouterr().err
