"""Commands that are killed, what they are killed in, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast.checkpoints.checkpoint import read_checkpoint
from support.command_line import run as command
from support.kill_points import Content, Work

slow = pytest.mark.slow
# What was done before a call B that is killed, and what is done afterwards.
CALLS = [
    ("nothing", "B"),
    ("A", "A"),
    *(pytest.param(*x, marks=slow) for x in (("nothing", "A"), ("A", "B"))),
]
TIMES = ("seconds", "seconds_median", "crc32", "environment", "date")  # what differs from run to run


def call(*arguments: object) -> None:
    """Run a command, which must succeed."""
    result = command(*arguments)
    assert result.exit_code == 0, result.output


def nothing() -> None:
    """Do nothing."""


def in_turn(
    before: str, last: str, first: Work, second: Work, resumed: Work | None = None
) -> tuple[Work, Work, Work]:
    """Return what is done before, what is killed, and what is done afterwards, for an entry of `CALLS`.

    Args:
        before, last: the entry.
        first: does A.
        second: does B.
        resumed: does B where nothing was done before, if that is another call.
    """
    start, again = (nothing, resumed or second) if before == "nothing" else (first, second)
    return start, second, first if last == "A" else again


def content_of(folder: Path) -> Content:
    """Return the files in a folder, apart from times and locks."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() and not path.name.endswith(".lock") and "tensorboard" not in path.parts
    }


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".safetensors":  # whose metadata are in another order each time
        return {name: tensor.tolist() for name, tensor in read_checkpoint(path).items()}
    if path.suffix == ".pt":
        return _plain(torch.load(path, weights_only=True))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _plain(value: Any) -> Any:
    """Return the same with bytes in place of tensors."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.numpy().tobytes() if isinstance(value, Tensor) else value


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
