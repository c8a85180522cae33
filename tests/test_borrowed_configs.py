"""Launch configs that come with the package: which GPU uses which."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from catseg_fast.engine import tuner
from catseg_fast.engine.tuner import Tunable
from catseg_fast.environment import describe_configs, describe_environment
from catseg_fast.inference import explain
from catseg_fast.kernels import TUNABLE_OPS
from catseg_fast.kernels.launch import config_files, configs
from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.window_attention import mlp
from support.gpus import fake_gpus
from support.tiny import tiny_model

CUDA = torch.device("cuda", 0)
H200, H100, A100 = ("NVIDIA H200", 90, 132), ("NVIDIA H100 PCIe", 90, 114), ("NVIDIA A100-SXM4-80GB", 80, 108)
DEFAULT = mlp.MLPConfig(rows=128, hidden=64, num_warps=8, num_stages=2)
SHIPPED = sorted(config_files.SHIPPED.glob("*/*.json"))


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folder of a user's configs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "catseg-fast" / "configs"


@pytest.fixture
def shipped(user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folder of the package's configs."""
    monkeypatch.setattr(config_files, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


def put(folder: Path, gpu: str, rows: int, capability: int | None, count: int | None = None) -> Path:
    """Write a config of the MLP that is recognised by its rows."""
    entry: dict[str, Any] = {
        "kernel": "mlp", "version": mlp.MLPConfig.version, "dtype": "fp16", "precision": "ieee", "gpu": gpu,
        "shape": {"positions": 576, "channels": 128, "hidden": 512, "crop_classes": 255},
        "config": asdict(replace(DEFAULT, rows=rows)),
    }  # fmt: skip
    entry |= {} if capability is None else {"capability": capability}
    entry |= {} if count is None else {"multiprocessors": count}
    path = config_files.config_path(folder, gpu, "window_block")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([entry]))
    configs.clear()
    return path


def problem(hidden: int = 512) -> Problem:
    x = torch.empty(5, 51, 576, 128, dtype=torch.float16, device="meta")
    sizes = {"positions": 576, "channels": 128, "hidden": hidden}
    return Problem.of("window_block", "mlp", mlp.MLPConfig, x, "ieee", **sizes)


def rows(hidden: int = 512) -> int:
    return configs.choose(problem(hidden), CUDA, lambda *_: DEFAULT).rows


@functools.cache
def problems() -> dict[Problem, LaunchConfig]:
    """The kernels at the sizes of the published variants in fp16, with their default configs on Hopper."""
    found = tuner.list_tunables(TUNABLE_OPS, torch.float16, [51], 5, torch.device("cpu"))
    return {tunable.problem: tunable.candidates[0] for tunable in found}


def chosen() -> dict[Problem, LaunchConfig]:
    defaults = problems()
    return {problem: configs.choose(problem, CUDA, lambda _, p: defaults[p]) for problem in defaults}


def test_an_h200_finds_its_own(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, H200)
    found = chosen()
    ours = {(p.op, p.kernel, p.sizes): (asdict(config), problems()[p]) for p, config in found.items()}
    others = set(ours)
    for path in SHIPPED:
        for entry in json.loads(path.read_text()):
            sizes = tuple((name, size) for name, size in entry["shape"].items() if name != "crop_classes")
            config, default = ours[path.stem, entry["kernel"], sizes]
            assert config == entry["config"]
            assert config != asdict(default) or entry["milliseconds"] == entry["default_milliseconds"]
            others.remove((path.stem, entry["kernel"], sizes))
    assert len(others) < len(ours)
    assert all(ours[key][0] == asdict(ours[key][1]) for key in others)
    assert "measured on NVIDIA H200" in describe_configs(CUDA, torch.float16)


def test_an_h100_borrows_them(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, H200)
    of_h200 = chosen()
    fake_gpus(monkeypatch, H100)
    assert chosen() == of_h200
    assert "borrowed from NVIDIA H200, of the same compute capability 9.0; " in describe_configs(
        CUDA, torch.float16
    )


def test_an_a100_has_the_defaults(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, A100)
    assert chosen() == problems()
    assert describe_configs(CUDA, torch.float16) == (
        "defaults (none were measured in fp16 at compute capability 8.0); "
        "`catseg-fast tune` measures this GPU's own"
    )


def test_what_comes_with_the_package_is_of_todays_kernels() -> None:
    """If a kernel changes, raise its config's version and delete its outdated configs."""
    assert {path.parent.name for path in SHIPPED} == {"nvidia-h200"}
    known = {(p.op, p.kernel, p.precision, tuple(sorted(p.sizes))): p for p in problems()}
    for path in SHIPPED:
        for entry in config_files.read(path, path.parent.name):
            sizes = tuple(sorted((k, v) for k, v in entry["shape"].items() if k != "crop_classes"))
            problem = known[path.stem, entry["kernel"], entry["precision"], sizes]
            assert entry.get("version", 1) == problem.config.version
            assert problem.config(**entry["config"])
            assert {"capability", "multiprocessors", "milliseconds", "triton", "torch"} <= entry.keys()


def test_a_config_of_another_version_of_a_kernel_is_ignored(
    shipped: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ignored without a warning, even if it could still be used; tuning replaces it."""
    fake_gpus(monkeypatch, H200)
    path = put(user, H200[0], 32, 90)
    assert rows() == 32
    monkeypatch.setattr(mlp.MLPConfig, "version", mlp.MLPConfig.version + 1)
    configs.clear()
    assert rows() == 128
    assert configs.origin(problem(), CUDA).startswith("defaults")
    outcome = tuner.Outcome(
        Tunable(problem(), (DEFAULT,), lambda _: pytest.fail("is not run")), {DEFAULT: 1.0}
    )
    tuner.save(path, H200[0], outcome.entry(H200[0]))
    (entry,) = config_files.read(path, H200[0])
    assert entry["version"] == mlp.MLPConfig.version
    assert rows() == 128


def test_own_go_before_borrowed_ones(shipped: Path, user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, H100)
    put(user, "NVIDIA H200", 16, 90, 132)
    assert rows() == 16
    put(shipped, H100[0], 32, 90, 114)
    assert rows() == 32
    put(user, H100[0], 64, 90, 114)
    assert rows() == 64


def test_the_nearest_gpu_of_the_same_capability_lends(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, ("NVIDIA H800", 90, 132))
    put(shipped, "NVIDIA H20", 16, 90, 78)
    put(shipped, "NVIDIA GB200", 64, 100, 132)
    assert rows() == 16
    put(shipped, "NVIDIA H100 PCIe", 32, 90, 114)
    assert rows() == 32
    put(shipped, "A chip of unknown size", 256, 90)
    assert rows() == 32
    assert configs.origin(problem(), CUDA).startswith("borrowed from NVIDIA H100 PCIe, of the same")


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120])
def test_the_rule_is_that_of_every_capability(
    capability: int, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, ("a chip", capability, 100))
    put(shipped, "another", 32, capability + 1, 100)
    put(shipped, "of no capability", 64, None, 100)
    assert rows() == 128
    put(shipped, "a third", 16, capability, 100)
    assert rows() == 16


def test_what_a_gpu_has_not_measured_is_borrowed(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel has a config of its own, the other borrows one."""
    fake_gpus(monkeypatch, H100)
    put(shipped, "NVIDIA H200", 16, 90, 132)
    path = put(shipped, H100[0], 32, 90, 114)
    assert rows() == 32
    entry = json.loads(path.read_text())[0]
    path.write_text(json.dumps([{**entry, "shape": {**entry["shape"], "hidden": 256}}]))
    configs.clear()
    assert rows() == 16
    assert rows(256) == 32


def test_a_broken_file_of_another_gpu_is_named_and_the_call_goes_on(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, H100)
    put(shipped, "NVIDIA H20", 16, 90, 78)
    path = config_files.config_path(shipped, "NVIDIA H200", "window_block")
    path.parent.mkdir()
    path.write_text("[{")
    with pytest.warns(UserWarning, match="nvidia-h200.window_block.json: not used") as caught:
        assert rows() == 16
    assert len(caught) == 1


def test_a_file_of_another_gpu_in_a_gpus_folder_is_named(
    shipped: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, H100)
    other = put(shipped, H200[0], 64, 90)
    own = config_files.config_path(user, H100[0], "window_block")
    own.parent.mkdir(parents=True)
    own.write_text(other.read_text())
    with pytest.warns(UserWarning, match="1 of 1 entries: entry 0 is for another GPU, 'NVIDIA H200'"):
        assert rows() == 64, "borrowed from the package's"


def test_without_a_home_folder_the_call_goes_on(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, a user may have no name and no home."""
    fake_gpus(monkeypatch, H200)
    put(shipped, H200[0], 64, 90)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.warns(UserWarning, match="user's folder of launch configs: not used: .*home"):
        assert rows() == 64


def test_environment_and_explain_say_whose_configs_run(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, H100, A100)
    report = describe_environment()
    assert "borrowed from NVIDIA H200" in report["GPU 0, launch configs"]
    assert report["GPU 1, launch configs"].startswith("defaults")
    model = tiny_model()
    assert "configs" not in model.explain()
    monkeypatch.setattr(type(model), "device", property(lambda _: CUDA))
    monkeypatch.setattr(explain, "choose_backend", lambda *_: "triton")
    assert "configs    " in model.explain()


def test_a_tuned_config_says_who_may_borrow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, H100)
    assert tuner._facts(CUDA) == {"capability": 90, "multiprocessors": 114}


def test_tuning_into_a_folder_that_cannot_be_written_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunables = [
        Tunable(problem(hidden), (DEFAULT,), lambda _: pytest.fail("is not run")) for hidden in (256, 512)
    ]
    monkeypatch.setattr(
        tuner, "tune", lambda tunable, *_: tuner.Outcome(tunable, {tunable.candidates[0]: 1.0})
    )
    (tmp_path / "folder").write_text("is a file")
    cpu = torch.device("cpu")
    outcomes = list(tuner.tune_all(tunables, cpu, "a chip", tmp_path / "folder", timer=lambda _: 1.0))
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert f"{tmp_path / 'folder' / 'a-chip' / 'window_block.json'} cannot be written" in str(
            outcome.unsaved
        )


def test_the_distance_is_by_ratio(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, ("a chip", 90, 100))
    put(shipped, "half", 16, 90, 50)
    put(shipped, "more", 32, 90, 160)
    assert math.log(160 / 100) < math.log(100 / 50)
    assert rows() == 32
