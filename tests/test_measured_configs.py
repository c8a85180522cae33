"""Measured launch configs: the choice of one, and files that are saved, merged or damaged."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from catseg_fast.engine import tuner
from catseg_fast.kernels.launch import config_files, configs
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.window_attention import mlp
from support.measured_configs import CPU, CUDA, DEFAULT, GPU, entry, problem, put, rows_of, use_empty_folders


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of the user's and the package's configs, both empty."""
    return use_empty_folders(tmp_path, monkeypatch)


def test_config_files_of_a_gpu(folders):
    assert config_files.user_folder() == folders[0]
    path = config_files.config_path(folders[0], "NVIDIA GeForce RTX 4090 (D)", "decode")
    assert path == folders[0] / "nvidia-geforce-rtx-4090-d" / "decode.json"


@pytest.mark.parametrize("value", [None, "", "relative"])
def test_user_folder_without_xdg(value, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert config_files.user_folder() == Path.home() / ".cache" / "catseg-fast" / "configs"


def test_order_interpreter_measured_default(folders):
    seen: list[int] = []

    def default(capability: int, problem: Problem) -> mlp.MLPConfig:
        seen.append(capability)
        return DEFAULT

    def interpreter(problem: Problem) -> mlp.MLPConfig:
        return replace(DEFAULT, rows=1024)

    assert configs.choose(problem(), CUDA, default, interpreter) is DEFAULT
    assert configs.choose(problem(), torch.device("cuda", 1), default, interpreter) is DEFAULT
    put(folders[0], [entry(32)])
    assert configs.choose(problem(), CUDA, default, interpreter) == replace(DEFAULT, rows=32)
    assert configs.choose(problem(), CPU, default, interpreter).rows == 1024
    assert seen == [90, 89]
    assert configs.choose(problem(), CPU, default) is DEFAULT


def test_nearest_number_of_crop_classes_by_ratio(folders):
    put(folders[0], [entry(16, 10), entry(32, 100), entry(64, 10_000)])
    found = {n: rows_of(problem(n)) for n in (1, 10, 30, 33, 100, 900, 1100, 50_000)}
    assert found == {1: 16, 10: 16, 30: 16, 33: 32, 100: 32, 900: 32, 1100: 64, 50_000: 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "qkv"},
        {"dtype": "bf16"},
        {"precision": "tf32x3"},
        {"shape": {"positions": 576, "channels": 256, "hidden": 512, "crop_classes": 255}},
        {"shape": {"positions": 576, "channels": 128, "crop_classes": 255}},
        {"shape": {"positions": 576, "channels": 128, "hidden": 512, "prompts": 1, "crop_classes": 255}},
    ],
    ids=str,
)
def test_all_else_must_be_equal(folders, changes):
    put(folders[0], [entry(32, **changes)])
    assert rows_of(problem()) == 128
    put(folders[0], [entry(32, **changes), entry(64, 1)])
    assert rows_of(problem()) == 64


def test_precision_matters_only_in_fp32(folders):
    put(folders[0], [entry(16), entry(32, dtype="fp32"), entry(64, dtype="fp32", precision="tf32x3")])
    assert rows_of(problem(precision="tf32x3")) == 16
    assert rows_of(problem(dtype=torch.float32)) == 32
    assert rows_of(problem(dtype=torch.float32, precision="tf32x3")) == 64


def test_the_users_go_before_the_packages(folders):
    user, shipped = folders
    put(shipped, [entry(16, 255), entry(32, 255, dtype="bf16")])
    put(user, [entry(64, 1)])
    assert rows_of(problem()) == 64
    assert rows_of(problem(dtype=torch.bfloat16)) == 32


def test_each_gpu_has_its_own(folders):
    put(folders[0], [entry(32)])
    put(folders[0], [entry(64, gpu="RTX 4090")], "RTX 4090")
    assert rows_of(problem()) == 32
    assert rows_of(problem(), torch.device("cuda", 1)) == 64


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[" * 100_000, "recursion"),
        (b"\xff\xfe", "decode"),
        ({"rows": 32}, "not a list"),
        ([32], "entry 0 is not an object"),
        ([{"config": {}}], "entry 0 lacks dtype, gpu, kernel, precision, shape"),
        ([entry(32, shape=[])], "not an object"),
        ([entry(32, config=None)], "not an object"),
        ([entry(32, shape={"positions": 576})], "not a positive integer: None"),
        ([entry(32, 0)], "not a positive integer: 0"),
        ([entry(32, gpu="NVIDIA H100")], "another GPU, 'NVIDIA H100'"),
        ([entry(32, config={"rows": 32})], "missing"),
        ([entry(32, config={**asdict(DEFAULT), "clusters": 2})], "clusters"),
        ([entry(32, config={**asdict(DEFAULT), "rows": 33})], "rows: 33 is not a power of two"),
        (
            [entry(32, config={**asdict(DEFAULT), "num_stages": 2.0})],
            "num_stages: 2.0 is not a positive integer",
        ),
        ([entry(32, config={**asdict(DEFAULT), "rows": True})], "rows: True is not a power of two"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_named_and_not_used(folders, content, reason):
    path = put(folders[0], content)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert [rows_of(problem()), rows_of(problem())] == [128, 128]  # read once, warned once
    (warning,) = caught
    assert str(path) in str(warning.message)
    put(folders[1], [entry(64)])
    with pytest.warns(UserWarning, match=reason):
        assert rows_of(problem()) == 64


def test_files_are_read_once(folders, monkeypatch):
    put(folders[0], [entry(32)])
    assert rows_of(problem()) == 32
    monkeypatch.setattr(json, "loads", None)
    assert rows_of(problem(100)) == 32
    assert rows_of(problem(100, torch.bfloat16)) == 128


def test_saving_merges(folders):
    path = put(folders[0], [entry(16, 255), entry(32, 1000), entry(64, kernel="qkv")])
    tuner.save(path, GPU, entry(128, 1000))
    tuner.save(path, GPU, entry(256, 10))
    found = [(item["kernel"], item["config"]["rows"]) for item in config_files.read(path, GPU)]
    assert found == [("mlp", 16), ("qkv", 64), ("mlp", 128), ("mlp", 256)]
    assert rows_of(problem(1000)) == 128


def test_saving_replaces_a_broken_file(folders):
    path = put(folders[0], b"[{")
    with pytest.warns(UserWarning, match=r"window_block\.json"):
        tuner.save(path, GPU, entry(32))
    assert config_files.read(path, GPU) == [entry(32)]


def test_saving_is_all_or_nothing(folders, monkeypatch):
    path = put(folders[0], [entry(32)])

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        tuner.save(path, GPU, entry(64))
    assert config_files.read(path, GPU) == [entry(32)]
    assert [found for found in path.parent.iterdir() if not found.name.endswith(".lock")] == [path]
