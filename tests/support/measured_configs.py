"""Launch configs in files, as if measured on a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from catseg_fast.kernels.launch import config_files, configs
from catseg_fast.kernels.launch.configs import Problem
from catseg_fast.kernels.window_attention import mlp
from support.gpus import fake_gpus

GPU = "NVIDIA H200"


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


DEFAULT = mlp.MLPConfig(rows=128, hidden=64, num_warps=8, num_stages=2)


def use_empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Fake two GPUs, and empty folders of configs of the user and the package; return both folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(config_files, "SHIPPED", tmp_path / "shipped")
    fake_gpus(monkeypatch, (GPU, 90, 132), ("RTX 4090", 89, 128))
    return tmp_path / "catseg-fast" / "configs", tmp_path / "shipped"


def problem(crop_classes: int = 255, dtype: torch.dtype = torch.float16, precision: str = "ieee") -> Problem:
    """Return a launch of the MLP kernel."""
    x = torch.empty(1, crop_classes, 576, 128, dtype=dtype, device="meta")
    sizes = {"positions": 576, "channels": 128, "hidden": 512}
    return Problem.of("window_block", "mlp", mlp.MLPConfig, x, precision, **sizes)


def entry(rows: int, crop_classes: int = 255, **changes: Any) -> dict[str, Any]:
    """Return a measured config of `problem(crop_classes)`; its rows tell it from others."""
    return {
        "kernel": "mlp", "version": mlp.MLPConfig.version, "dtype": "fp16", "precision": "ieee",
        "shape": {"positions": 576, "channels": 128, "hidden": 512, "crop_classes": crop_classes},
        "config": asdict(replace(DEFAULT, rows=rows)), "milliseconds": 1.0, "gpu": GPU, **changes,
    }  # fmt: skip


def put(folder: Path, content: object, gpu: str = GPU) -> Path:
    """Write a file of `window_block`, as JSON unless it is bytes."""
    path = config_files.config_path(folder, gpu, "window_block")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    configs.clear()
    return path


def rows_of(wanted: Problem, device: torch.device = CUDA) -> int:
    """Return the rows of the chosen config; the default has 128."""
    return configs.choose(wanted, device, lambda *_: DEFAULT).rows
