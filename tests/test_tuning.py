"""The tuner: its candidates, what it measures and what it keeps, in the interpreter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from catseg_fast.cli import main as cli
from catseg_fast.engine import schedule as planner
from catseg_fast.engine import tuner
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.tuner import Tunable
from catseg_fast.kernels import TUNABLE_OPS, load
from catseg_fast.kernels.launch import config_files, configs
from catseg_fast.kernels.launch.capability import CAPABILITIES, of_gpu
from catseg_fast.kernels.launch.checks import INTERPRETED
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.launch.op import Sizes
from support.aggregators import PUBLISHED, features, make_aggregator
from support.measured_configs import CPU, CUDA, GPU, use_empty_folders

TINY = Sizes(
    crops=2, classes=2, height=3, width=6, channels=32, heads=2, window=3, shift=1, hidden=48, features=32,
    prompts=3, decoder=(32, 16),
)  # fmt: skip

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs kernels in Triton's interpreter")


WORKLOADS = [
    (capability, dtype, precision, crops, classes)
    for capability in CAPABILITIES
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for precision in (("ieee", "tf32x3") if dtype == torch.float32 else ("ieee",))
    for crops, classes in ((5, 51), (1, 4))
]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of the user's and the package's configs, both empty."""
    return use_empty_folders(tmp_path, monkeypatch)


def tunables_of(op: str, sizes: Sizes, dtype: torch.dtype = torch.float16) -> list[Tunable]:
    return tuner.tunables(load(op), sizes, dtype, "ieee", 90)


@pytest.mark.parametrize("op", TUNABLE_OPS)
def test_every_op_has_candidates_for_every_gpu(op):
    for capability, dtype, precision, crops, classes in WORKLOADS:
        for published in load(op).sizes.values():
            sizes = replace(published, crops=crops, classes=classes)
            found = tuner.tunables(load(op), sizes, dtype, precision, capability)
            assert {tunable.problem.op for tunable in found} == {op}
            for tunable in found:
                assert 8 <= len(tunable.candidates) <= 32, tunable.problem
                assert len(set(tunable.candidates)) == len(tunable.candidates)
                assert all(type(config) is tunable.problem.config for config in tunable.candidates)


@pytest.mark.parametrize("op", TUNABLE_OPS)
def test_the_default_is_the_first_candidate(op):
    for capability, dtype, precision, crops, classes in WORKLOADS:
        sizes = replace(next(iter(load(op).sizes.values())), crops=crops, classes=classes)
        calls, _ = load(op).dry_run(sizes, dtype, precision, capability)
        for call in calls:
            default = call.kernel.default_config(capability, call.problem)
            assert call.kernel.candidates(capability, call.problem)[0] == default


@interpreted
@pytest.mark.parametrize("op", TUNABLE_OPS)
def test_tunables_run_and_the_candidates_agree(op):
    """Run the default, and the candidate with the largest tiles."""
    variants = [TINY, replace(TINY, prompts=1)] if op == "embed_cost_volume" else [TINY]
    for tunable in (tunable for sizes in variants for tunable in tunables_of(op, sizes)):
        largest = max(
            tunable.candidates[1:], key=lambda config: math.prod(filter(None, asdict(config).values()))
        )
        chosen = (tunable.candidates[0], largest)
        outcome = tuner.tune(replace(tunable, candidates=chosen), CPU, run_once)
        assert outcome is not None
        assert tuple(outcome.milliseconds) == chosen, (tunable.problem, outcome)


@interpreted
@torch.no_grad()
def test_what_the_tuner_measures_is_what_the_engine_asks_for(monkeypatch):
    asked: set[Problem] = set()
    choose = configs.choose

    def spy(problem: Problem, *arguments: Any) -> Any:
        asked.add(problem)
        return choose(problem, *arguments)

    monkeypatch.setattr(configs, "choose", spy)
    for prompts in (3, 1):
        engine = Engine(make_aggregator(prompt_channel=prompts, num_layers=1, **PUBLISHED).float())
        engine.backend, engine.precision = "triton", torch.float32
        image, text, guidance = features(engine.aggregator, 2, 1, (12, 12))
        engine.logits(image.float(), text.float(), [x.float() for x in guidance], None)
    monkeypatch.undo()
    sizes = replace(TINY, crops=1, height=12, width=12, window=12, shift=0, hidden=128)
    expected = {
        tunable.problem
        for op in TUNABLE_OPS
        for prompts in (3, 1)
        for tunable in tunables_of(op, replace(sizes, prompts=prompts), torch.float32)
    }
    assert expected == asked


def run_once(call: Callable[[], object]) -> float:
    call()
    return 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("op", TUNABLE_OPS)
def test_tunes_on_a_gpu(op):
    device = torch.device("cuda", torch.cuda.current_device())
    for tunable in tuner.list_tunables([op], torch.float16, [7], 1, device):
        outcome = tuner.tune(tunable, device, tuner.median_milliseconds)
        assert outcome is not None
        assert outcome.reason is None
        assert not outcome.wrong
        assert min(outcome.milliseconds.values()) > 0


def make_tunable(*times: float | str) -> tuple[Tunable, Callable[[Callable[[], object]], float]]:
    """Return a kernel with a candidate for each time, or for a fault, and a timer that knows the times."""
    found = tunables_of("window_block", TINY, torch.float32)
    original = next(tunable for tunable in found if tunable.problem.kernel == "qkv")
    configs = [replace(original.candidates[0], num_stages=number) for number, _ in enumerate(times, 1)]

    def run(inputs: Any, config: Any) -> Any:
        time = times[config.num_stages - 1]
        if time == "fails":
            raise RuntimeError("out of resources")
        result = [x.clone() for x in original.run(inputs, config)]
        inputs.arguments[0].zero_()  # a kernel may overwrite its inputs
        if time == "wrong":
            result[0][0, 0, 5, 5] *= 1.01
        if time == "NaN":
            result[0][0, 0, 5, 5] = math.nan
        return result

    def timer(call: Any) -> float:
        call()
        time = times[call.args[1].num_stages - 1]
        assert isinstance(time, float)
        return time

    return replace(original, candidates=tuple(configs), run=run), timer


@interpreted
def test_the_fastest_right_candidate_wins():
    tunable, timer = make_tunable(3.0, "wrong", 2.0, "fails", 4.0, "NaN")
    outcome = tuner.tune(tunable, CPU, timer)
    assert outcome is not None
    assert outcome.reason is None
    assert list(outcome.milliseconds.values()) == [3.0, 2.0, 4.0]
    assert outcome.best == tunable.candidates[2]
    assert (outcome.failed, outcome.wrong) == (1, [tunable.candidates[1], tunable.candidates[5]])
    assert outcome.default_milliseconds == 3.0


@interpreted
@pytest.mark.parametrize(("fault", "reason"), [("fails", "out of resources"), ("NaN", "NaN")])
def test_without_a_default_nothing_is_kept(tmp_path, fault, reason):
    tunable, timer = make_tunable(fault, 1.0)
    (outcome,) = tuner.tune_all([tunable], CPU, GPU, tmp_path, timer=timer)
    assert reason in str(outcome.reason)
    assert not list(tmp_path.iterdir())


@interpreted
def test_a_lost_gpu_ends_it():
    def lost(call: object) -> float:
        raise torch.AcceleratorError("illegal memory access")

    with pytest.raises(torch.AcceleratorError):
        tuner.tune(make_tunable(1.0)[0], CPU, lost)


@interpreted
def test_what_is_measured_is_found(folders):
    tunable, timer = make_tunable(3.0, 2.0)
    (outcome,) = tuner.tune_all([tunable], CPU, GPU, folders[0], timer=timer)
    chosen = configs.choose(tunable.problem, CUDA, lambda *_: tunable.candidates[0])
    assert chosen == outcome.best == tunable.candidates[1]
    (written,) = json.loads(config_files.config_path(folders[0], GPU, "window_block").read_text())
    assert written["gpu"] == GPU
    assert (written["milliseconds"], written["default_milliseconds"]) == (2.0, 3.0)
    assert written["shape"] == {"positions": 18, "channels": 32, "crop_classes": 4}
    assert {"triton", "torch", "catseg_fast", "date"} <= written.keys()


@interpreted
def test_when_time_is_up_what_is_complete_is_kept(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(tuner.time, "monotonic", lambda: next(clock))
    first, timer = make_tunable(3.0, 2.0)
    second = replace(first, problem=first.problem._replace(classes=1000))
    advanced: list[None] = []
    # The clock advances by a second per reading: at the start, at each default, then before each candidate.
    outcomes = list(
        tuner.tune_all(
            [first, second],
            CPU,
            GPU,
            tmp_path,
            timer=timer,
            seconds=5.5,
            advance=lambda: advanced.append(None),
        )
    )
    assert [outcome.tunable for outcome in outcomes] == [first]
    assert len(advanced) == 3
    assert len(config_files.read(config_files.config_path(tmp_path, GPU, "window_block"), GPU)) == 1


@interpreted
def test_in_little_time_the_slowest_kernels_come_first(tmp_path):
    times = {10: 1.0, 1000: 3.0, 100: 2.0, 1: "fails"}
    made = {count: make_tunable(time) for count, time in times.items()}
    tunables = [
        replace(tunable, problem=tunable.problem._replace(crops=1, classes=count))
        for count, (tunable, _) in made.items()
    ]
    timers = {id(tunable.run): timer for tunable, (_, timer) in zip(tunables, made.values(), strict=True)}

    def timer(call: Any) -> float:
        return timers[id(call.func)](call)

    def order(**limit: float) -> list[int]:
        outcomes = tuner.tune_all(tunables, CPU, GPU, tmp_path, timer=timer, **limit)
        return [outcome.tunable.problem.crop_classes for outcome in outcomes]

    assert order(seconds=1e6) == [1000, 100, 10, 1]
    assert order() == [10, 1000, 100, 1]


@pytest.mark.usefixtures("folders")
def test_vocabularies_become_launches():
    def launches(*classes: int, crops: int = 5, dtype: torch.dtype = torch.float16) -> list[tuple[str, int]]:
        found = tuner.list_tunables(["class_apply"], dtype, classes, crops, CUDA)
        return [(tunable.problem.precision, tunable.problem.crop_classes) for tunable in found]

    many, alone = (planner.usual_chunk(1_000_000, crops, CUDA) for crops in (5, 1))
    assert launches(1_000_000, 2_000_000) == [("ieee", 5 * many)]
    assert launches(2, 3, 1_000_000, crops=1) == [("ieee", 2), ("ieee", 3), ("ieee", alone)]
    assert launches(2, dtype=torch.float32) == [("ieee", 10), ("tf32x3", 10)]


def run_tune(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["tune", *arguments], prog_name="catseg-fast")


@interpreted
def test_command(folders, monkeypatch, tmp_path):
    tunable, timer = make_tunable(3.0, "wrong", 2.0, "fails")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("catseg_fast.cli.tune._require_gpu", lambda: CUDA)
    monkeypatch.setattr(tuner, "list_tunables", lambda *_: [tunable])
    monkeypatch.setattr(tuner, "median_milliseconds", timer)
    tune_on = tuner.tune
    monkeypatch.setattr(tuner, "tune", lambda tunable, device, *rest: tune_on(tunable, CPU, *rest))

    result = run_tune("--op", "window_block")
    assert result.exit_code == 0, result.output
    assert "3.000 ms │ 2.000 ms │ 1.50x │ 2     │ 1      │ 1" in result.stdout
    assert f"{GPU}: written to {folders[0]}" in result.stdout
    assert "note: window_block, qkv" in result.stderr
    assert config_files.config_path(folders[0], GPU, "window_block").is_file()

    result = run_tune("--minutes", "0", "--output", str(tmp_path / "here"))
    assert result.exit_code == 0
    assert "time is up: 0 of 1 kernels and shapes are done" in result.stderr
    assert not (tmp_path / "here").exists()

    monkeypatch.setattr(tuner, "list_tunables", lambda *_: [make_tunable("fails")[0]])
    result = run_tune()
    assert result.exit_code == 1
    assert "the default config does not run: out of resources" in result.stderr


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), 80),
        ((8, 7), 86),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((11, 0), 100),
        ((12, 0), 89),
        ((12, 1), 89),  # 99 KB of shared memory per program, not 227
    ],
)
def test_default_configs_fit_gpus_between_those_that_are_known(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert of_gpu.__wrapped__(torch.device("cuda", 0)) == expected


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("available", "capability", "message"),
    [
        (False, (9, 0), f"needs a CUDA GPU, to time kernels on; found none, with torch {torch.__version__}"),
        (True, (7, 5), "has compute capability 7.5"),
        (True, (9, 0), "TRITON_INTERPRET is set"),
    ],
)
def test_command_without_a_gpu_to_time_on(available, capability, message, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("catseg_fast.kernels.launch.checks.INTERPRETED", True)
    result = run_tune()
    assert result.exit_code == 1
    assert result.stderr.startswith("error: tune: ")
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "label_map"], "embed_cost_volume, window_block"),
        (["--op", "decode", "--op", "x"], "'x' is not one of"),
        (["--dtype", "fp8"], "fp16, bf16, fp32"),
        (["--classes", "0"], "--classes"),
        (["--minutes", "-1"], "--minutes"),
        (["--output", __file__], "is not a folder"),
    ],
)
def test_usage_errors(arguments, message, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run_tune(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
