"""Checkpoints of training on disk: damaged ones are noticed, and the previous one is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from catseg_fast.checkpoints.checkpoint import read_checkpoint
from catseg_fast.training.checkpoints import Checkpoints

TENSORS = {"a": torch.arange(90_000.0).view(300, 300), "b": torch.arange(3)}


@pytest.mark.filterwarnings("ignore:.*is damaged:RuntimeWarning")
def test_a_bit_flip_in_a_training_checkpoint_is_noticed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    run = {"lr": 1e-3, "classes": ["sky", "tree"]}
    content = {"step": 2, "model": {"a": torch.arange(300.0)}, "run": run}
    path = checkpoints.save(2, content)
    valid = path.read_bytes()
    noticed = 0
    positions = range(0, len(valid) * 8, 31)
    for position in positions:
        data = bytearray(valid)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            found = checkpoints.load()
        except ValueError:
            noticed += 1
        else:  # a bit without effect, such as of a date in the archive
            assert same(found, content), f"bit {position} of {len(valid) * 8}"
    assert noticed > 0.5 * len(positions)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"step": step, **TENSORS})
    data = bytearray(checkpoints.path(2).read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of a tensor
    checkpoints.path(2).write_bytes(data)
    with pytest.warns(RuntimeWarning, match=r"step-00000002\.pt is damaged: .* the checksum of .*data/0"):
        found = checkpoints.load()
    assert found is not None
    assert found["step"] == 1


def same(found: Any, expected: dict[str, Any]) -> bool:
    return (
        found.keys() == expected.keys()
        and torch.equal(found["model"]["a"], expected["model"]["a"])
        and all(found[key] == expected[key] for key in ("step", "run"))
    )


def test_the_writers_checksums_do_not_depend_on_torchs_setting(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, TENSORS)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(before)
    loaded = checkpoints.load()
    assert loaded is not None
    assert torch.equal(loaded["a"], TENSORS["a"])
    assert read_checkpoint(checkpoints.path(1)).keys() == TENSORS.keys()
