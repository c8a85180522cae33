"""Files of weights: every layout is read, no code is run, and damage is named."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from catseg_fast.checkpoints.checkpoint import read_checkpoint
from support.accuracy import assert_same

SMALL = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor([1, 2]), "c": torch.ones(2).half()}


NUMPY = {key: value.numpy() for key, value in SMALL.items()}


WRITERS: dict[str, Callable[[Path], Any]] = {
    "detectron2": lambda path: torch.save({"model": SMALL, "optimizer": {}, "iteration": 7}, path),
    "numpy": lambda path: torch.save({"model": NUMPY, "iteration": np.int64(7), "lr": np.float64(1)}, path),
    "lightning": lambda path: torch.save({"epoch": 1, "state_dict": SMALL}, path),
    "plain": lambda path: torch.save(SMALL, path),
    "numpy layouts": lambda path: torch.save(
        {"a.weight": np.asfortranarray(NUMPY["a.weight"]), "b": NUMPY["b"].astype(">i8"), "c": NUMPY["c"]},
        path,
    ),
    "legacy": lambda path: torch.save(SMALL, path, _use_new_zipfile_serialization=False),
    "parameters": lambda path: torch.save(
        {key: nn.Parameter(value, requires_grad=False) for key, value in SMALL.items()}, path
    ),
    "data parallel": lambda path: torch.save({"module." + key: value for key, value in SMALL.items()}, path),
    "safetensors": lambda path: save_file(SMALL, path),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reads_every_layout_by_content(writer: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    WRITERS[writer](path)
    found = read_checkpoint(path)
    assert_same(found, SMALL)
    assert not any(isinstance(value, nn.Parameter) for value in found.values())


class RunsCode:
    """Creates the file "executed" in the working directory when a careless reader unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


REFUSED: dict[str, Callable[[Path], Any]] = {
    "zip": lambda path: torch.save({"model": SMALL, "hook": RunsCode()}, path),
    "legacy": lambda path: torch.save({"model": RunsCode()}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"model": RunsCode()})),
    "detectron2 pkl": lambda path: path.write_bytes(pickle.dumps({"model": NUMPY})),
    "whole module": lambda path: torch.save(nn.Linear(2, 2), path),
}


@pytest.mark.parametrize("writer", REFUSED)
@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl", "weights.safetensors"])
def test_never_runs_code(writer: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    REFUSED[writer](path)
    with pytest.raises(ValueError, match=f"{name} is refused: .*could execute code.*safetensors") as caught:
        read_checkpoint(path)
    assert not Path("executed").exists()
    if writer in ("zip", "legacy"):
        assert ".mkdir" in str(caught.value)


def saved(content: Any, path: Path, **options: Any) -> bytes:
    torch.save(content, path, **options)
    return path.read_bytes()


def torchscript(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/constants.pkl", b"")
    return path.read_bytes()


def safetensors_bytes(path: Path) -> bytes:
    save_file(SMALL, path)
    return path.read_bytes()


def zeros(path: Path, **options: Any) -> bytes:
    return saved({"model": {"a": torch.zeros(100, 100)}}, path, **options)


DAMAGED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda path: b"", "is empty"),
    "zip cut at its start": (lambda path: zeros(path)[:40], "truncated"),
    "zip cut in the middle": (lambda path: zeros(path)[:20000], "truncated"),
    "zip cut at its end": (lambda path: zeros(path)[:-1], "truncated"),
    "legacy, cut": (lambda path: zeros(path, _use_new_zipfile_serialization=False)[:20000], "truncated"),
    "safetensors, header cut": (lambda path: safetensors_bytes(path)[:60], "truncated"),
    "safetensors, data cut": (lambda path: safetensors_bytes(path)[:-4], "truncated"),
    "a few bytes": (lambda path: b"1234", "neither a PyTorch nor a safetensors"),
    "web page": (lambda path: b"<html>404</html>" * 99, "neither a PyTorch nor a safetensors"),
    "LFS pointer": (lambda path: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "TorchScript": (torchscript, "TorchScript"),
    "list": (lambda path: saved([torch.zeros(2)], path), "holds a list"),
    "no tensors": (lambda path: saved({"epoch": 3, "w": torch.zeros(2)}, path), "'epoch' is a int"),
    "numpy objects": (
        lambda path: saved({"w": np.array([None])}, path),
        "numpy arrays of type O8 are not supported",
    ),
    "text in the model": (lambda path: saved({"model": {"w": "?"}}, path), "'w' is a str"),
    "numbered keys": (lambda path: saved({0: torch.zeros(2)}, path), "entry 0"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    write, reason = DAMAGED[damage]
    path = tmp_path / "weights.pth"
    path.write_bytes(write(path))
    with pytest.raises(ValueError, match=re.escape(str(path)) + f".*{reason}"):
        read_checkpoint(path)


def test_a_forged_numpy_dtype_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    content = saved({"w": np.zeros(2)}, path, _use_new_zipfile_serialization=False)
    flags = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"  # size, alignment, flags of numpy's dtype
    assert content.count(flags) == 1
    path.write_bytes(content.replace(flags, flags.replace(b"K\x00", b"K\x3f")))  # as if it held objects
    assert_same(read_checkpoint(path), {"w": torch.zeros(2, dtype=torch.float64)})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_checkpoint(tmp_path / "none.pth")
