"""Files of measured launch configs: written by several processes, and damaged."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from catseg_fast.engine import tuner
from catseg_fast.kernels.launch import config_files

GPU = "NVIDIA H200"


def entry(rows: int, crop_classes: int) -> dict[str, Any]:
    return {
        "kernel": "mlp", "dtype": "fp16", "precision": "ieee", "gpu": GPU, "config": {"rows": rows},
        "shape": {"positions": 576, "crop_classes": crop_classes},
    }  # fmt: skip


def test_processes_that_save_at_a_time_lose_nothing(tmp_path: Path) -> None:
    """Eight processes with ten entries each."""
    path = config_files.config_path(tmp_path, GPU, "window_block")

    def save_ten(index: int) -> None:
        for number in range(10):
            tuner.save(path, GPU, entry(32, 1 + 10 * index + number))

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=save_ten, args=(index,)) for index in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 8
    found = sorted(item["shape"][config_files.FREE_SIZE] for item in config_files.read(path, GPU))
    assert found == list(range(1, 81))


DAMAGED_LINES = {
    "cut": lambda line: line[:40],
    "no text": lambda line: line.replace(b"mlp", b"\xff\xfe"),
    "no object": lambda line: b"32,",
    "lacks": lambda line: b'{"config": {}},',
    "another GPU": lambda line: line.replace(b"H200", b"H100"),
    "a bracket": lambda line: line.replace(b"{", b"[", 1),
}


@pytest.mark.parametrize("damage", DAMAGED_LINES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_entry_does_not_void_the_others(damage: str, place: int, tmp_path: Path) -> None:
    path = config_files.config_path(tmp_path, GPU, "window_block")
    rows = [16, 32, 64]
    for number, count in enumerate(rows):
        tuner.save(path, GPU, entry(count, 10 ** (number + 1)))
    lines = path.read_bytes().splitlines()
    lines[place + 1] = DAMAGED_LINES[damage](lines[place + 1])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=rf"not used: 1 of 3 entries: entry {place} ") as caught:
        found = config_files.read(path, GPU)
    assert [item["config"]["rows"] for item in found] == [*rows[:place], *rows[place + 1 :]]
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="not used"):
        tuner.save(path, GPU, entry(128, 10**4))
    assert len(config_files.read(path, GPU)) == 3
