"""The first call on a GPU: its launches are listed, compiled in parallel and checked, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast.engine import first_call, self_check
from catseg_fast.engine.compiling import Job, compile_jobs
from catseg_fast.engine.terms import image_terms
from catseg_fast.engine.triton_stages import TritonStages
from catseg_fast.environment import ptxas
from catseg_fast.files import user_cache
from catseg_fast.kernels.launch.launcher import listing, record
from support.engines import make_engine, make_inputs_of, make_terms

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("policy", ["resident", "recompute"])
@torch.no_grad()
def test_lists_what_a_call_launches(policy: str) -> None:
    engine = make_engine()
    image, text, guidance = make_inputs_of(engine.aggregator, 2)
    inputs = (image, text, guidance)
    engine.policy, engine.chunk = policy, 1
    with record(execute=False, note=Job.of) as listed:
        assert listing()
        engine.logits(*inputs, None)
    assert not listing()
    with record(note=Job.of) as launched:
        engine.logits(*inputs, None)
    assert listed == launched
    assert len(set(listed)) < len(listed)


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record of `get_ready` without a compiler: compiled kernels, and the number of checks."""
    seen: dict[str, Any] = {"jobs": [], "checks": 0, "wrong": {}}

    def compile_all(jobs: list[Job], device: torch.device, advance: Any) -> dict[Job, str]:
        seen["jobs"].append(set(jobs))
        return {}

    def check(*_: Any) -> dict[str, str]:
        seen["checks"] += 1
        return dict(seen["wrong"])

    monkeypatch.setattr(first_call, "compile_jobs", compile_all)
    monkeypatch.setattr(first_call, "wrong_stages", check)
    return seen


def notes() -> list[Path]:
    return sorted((user_cache() / "self-check").glob("*"))


def test_checks_once_for_all_processes(ready: dict[str, Any]) -> None:
    plan, image = make_terms(prompt_channel=1)
    called: list[bool] = []
    stages = TritonStages(plan)
    for _ in range(2):
        first_call.get_ready(stages, image, True, lambda: called.append(listing()))
    assert called == [True]
    assert ready["checks"] == 1
    assert len(ready["jobs"][0]) > 10
    assert "passed" in json.loads(notes()[0].read_text())
    other = TritonStages(make_terms(prompt_channel=1)[0])  # as in another process
    first_call.get_ready(other, image, True, lambda: None)
    assert ready["checks"] == 1
    assert ready["jobs"][1] == set()


def test_checks_again_what_is_new(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, image = make_terms(prompt_channel=1)
    first_call.get_ready(TritonStages(plan), image, True, None)
    wider, other = make_terms(prompt_channel=1, decoder_dims=(64, 16))
    first_call.get_ready(TritonStages(wider), other, True, None)
    first_call.get_ready(TritonStages(plan, "tf32x3"), image, True, None)
    monkeypatch.setattr(first_call, "_versions", lambda _: {"compiler": "triton 9.9, ptxas 99.9"})
    first_call.get_ready(TritonStages(plan), image, True, None)
    assert ready["checks"] == len(notes()) == 4


def test_what_is_wrong_runs_in_torch_and_is_not_remembered(ready: dict[str, Any]) -> None:
    plan, image = make_terms(prompt_channel=1)
    ready["wrong"] = {"decode": "two runs differ"}
    for count in (1, 2):
        stages = TritonStages(plan)
        with pytest.warns(
            RuntimeWarning, match="decode runs in torch, .* torch's on this GPU: two runs differ"
        ):
            first_call.get_ready(stages, image, True, None)
        assert ready["checks"] == count
        assert list(stages.fallbacks) == ["decode"]
    assert not notes()


def test_a_broken_note_is_named(ready: dict[str, Any]) -> None:
    plan, image = make_terms(prompt_channel=1)
    first_call.get_ready(TritonStages(plan), image, True, None)
    (note,) = notes()
    for content in ("{", "[]", "", '{"failed": 1}'):
        note.write_text(content)
        with pytest.warns(UserWarning, match=f"{note} is damaged; the kernels are checked again"):
            first_call.get_ready(TritonStages(plan), image, True, None)
    assert ready["checks"] == 5


def test_a_cache_folder_that_cannot_be_written_is_named(ready: dict[str, Any]) -> None:
    user_cache().parent.mkdir()
    user_cache().write_text("in the way")
    plan, image = make_terms(prompt_channel=1)
    message = f"{user_cache() / 'self-check'}: cannot record that the kernels passed"
    with pytest.warns(UserWarning, match=message):
        first_call.get_ready(TritonStages(plan), image, True, None)
    assert ready["checks"] == 1


@torch.no_grad()
def test_the_kernels_of_a_check_are_those_of_calls() -> None:
    """Besides them, two chunks of classes are collected, as in a call whose state does not fit."""
    engine = make_engine()
    inputs = make_inputs_of(engine.aggregator, 130, 2)
    engine.chunk = 97
    with record(execute=False, note=Job.of) as called:
        engine.logits(*inputs, None)
    plan = engine.plan()
    image = image_terms(engine.aggregator, plan, inputs[0], inputs[2])
    candidate = TritonStages(self_check.random_plan(plan))
    with record(execute=False, note=Job.of) as checked:
        self_check.run_stream(candidate, candidate.plan, image, True)
    further = {job.name for job in set(checked) - set(called)}
    assert {job.name for job in checked} >= {job.name for job in called}
    assert further <= {"collect_kernel"}


WARM = """
import json, sys
import torch
import triton
from bench.fake_gpu import fake_gpu
from catseg_fast.engine.compiling import Job, compile_jobs
from catseg_fast.kernels.launch.launcher import record
from support import no_gpu_driver
from support.engines import make_engine, make_inputs_of

def call(engine, inputs):
    for _ in range(2):
        engine.logits(*inputs, None)

with torch.device("cpu"):
    engine = make_engine(pooling_size=(1, 1))
    inputs = make_inputs_of(engine.aggregator, 3, 2)
engine.aggregator.to("meta")
engine.precision = torch.float16
inputs = [x.to("meta") if isinstance(x, torch.Tensor) else [y.to("meta") for y in x] for x in inputs]
compiled = []

def listen(src, metadata, metadata_group, times, cache_hit):
    compiled.append(cache_hit)

with torch.no_grad(), fake_gpu(), record(execute=False, note=Job.of) as jobs:
    call(engine, inputs)
no_gpu_driver.activate()
triton.knobs.compilation.listener = listen
failed = compile_jobs(jobs, torch.device("meta"), threads=2)
first = list(compiled)
compiled.clear()

# In the same process, through Triton's own launch code up to the driver.
def launched(self, *_):
    self._run = lambda *_: None
    self.function = 1
triton.compiler.CompiledKernel._init_handles = launched
triton.compiler.CompiledKernel.launch_metadata = lambda *_: None
launches = []
with torch.no_grad(), fake_gpu(compiles=True), record(note=lambda launch: launches.append(launch.compiled)):
    call(engine, inputs)
again = list(compiled)
compiled.clear()

# As in another process: Triton's cache folder only.
for job in jobs:
    job.kernel.device_caches.clear()
compile_jobs(jobs, torch.device("meta"), threads=2)
print(json.dumps([len(set(jobs)), sorted(failed.values()), first, again, compiled, len(launches)]))
"""


@pytest.mark.xdist_group("aot")
def test_nothing_is_compiled_after_a_warm_up(tmp_path: Path) -> None:
    """Triton's compilation hook is not called in the process that was warmed up, nor in another one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", WARM], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels, failed, first, again, other, launches = json.loads(done.stdout.splitlines()[-1])
    assert kernels > 10
    assert not failed
    assert first == [False] * kernels  # a cold start
    assert launches > kernels
    assert again == []
    assert other == [True] * kernels


def test_a_kernel_that_does_not_compile_stops_no_other() -> None:
    plan, image = make_terms(prompt_channel=1)
    candidate = TritonStages(plan)
    with record(execute=False, note=Job.of) as jobs:
        self_check.run_stream(candidate, plan, image, True)
    broken = Job(jobs[0].module, "no_kernel", (), ())
    seen: list[tuple[int, int]] = []
    device = torch.device("cpu")
    failed = compile_jobs([broken, *jobs], device, advance=lambda *now: seen.append(now))
    assert list(failed) == [broken]
    assert "no_kernel" in failed[broken]
    count = len(set(jobs)) + 1
    assert seen == [(done, count) for done in range(1, count + 1)]


def test_names_the_assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ptxas(90).replace(".", "").isdigit()  # Triton's own
    tool = tmp_path / "ptxas"
    tool.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.4, V13.4.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
    assert ptxas(90) == f"13.4 ({tool})"


def test_tensors_are_not_kept_and_alignment_counts() -> None:
    def job(x: Tensor) -> Job:
        kernel = type("Kernel", (), {"fn": test_tensors_are_not_kept_and_alignment_counts})
        from catseg_fast.kernels.launch.launcher import Launch

        return Job.of(Launch(kernel, (1,), {"x": x, "n": 7}, {}, {}))

    x = torch.zeros(64)
    assert job(x) == job(torch.ones(128)) != job(x[1:])
    assert job(x[4:]) == job(x)
    assert hash(job(x)) == hash(job(x[4:]))
    assert not any(isinstance(value, Tensor) for value in job(x).arguments)
