"""Choice of the classes per step."""

from __future__ import annotations

import pytest
import torch

from catseg_fast.engine.schedule import usual_chunk

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("classes", "crops", "expected"),
    [
        (150, 5, 150),  # everything in one step if it fits
        (847, 5, 192),  # five steps of at most three tiles of 64
        (1203, 5, 192),
        (1203, 1, 640),  # two equal steps
        (4096, 5, 192),
        (2000, 40, 25),  # less than a tile
        (1, 5, 1),
    ],
)
def test_steps_on_a_gpu_are_equal_and_of_whole_tiles(classes: int, crops: int, expected: int) -> None:
    assert usual_chunk(classes, crops, GPU) == expected


@pytest.mark.parametrize("crops", [1, 2, 3, 5, 16, 17, 100, 2000])
def test_steps_never_exceed_the_limit(crops: int) -> None:
    for classes in (1, 2, 63, 64, 65, 150, 256, 847, 1203, 10000):
        chunk = usual_chunk(classes, crops, GPU)
        assert 1 <= chunk <= classes
        assert chunk * crops <= max(1024, crops)
        if chunk < classes and 1024 // crops >= 64:
            assert chunk % 64 == 0


def test_a_cpu_keeps_to_its_cache() -> None:
    assert usual_chunk(150, 1, torch.device("cpu")) == 8
