"""Choice of the classes per step, and the free memory that it depends on."""

from __future__ import annotations

import pytest
import torch

from catseg_fast.engine.engine import Engine
from catseg_fast.engine.free_memory import free_bytes
from catseg_fast.engine.schedule import Schedule, Sizes, plan_schedule, usual_chunk
from support.aggregators import make_aggregator

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


def test_memory_of_recordings_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps memory, of which ordinary tensors can use all but what private pools have."""
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 70, "allocated_size": 30},
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 500, "allocated_size": 100},
        {"device": 1, "segment_pool_id": (0, 2), "total_size": 9000, "allocated_size": 0},
    ]
    for name, value in {
        "mem_get_info": lambda _: (1000, 2000),
        "memory_reserved": lambda _: 570,
        "memory_allocated": lambda _: 130,
        "memory_snapshot": lambda: segments,
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert free_bytes(torch.device("cuda", 0)) == free_bytes(GPU) == 1000 + 70 - 30


def test_a_call_beside_recordings_is_planned_for_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 0
    for name, value in {
        "mem_get_info": lambda _: (2**28, 2**33),
        "memory_reserved": lambda _: held,
        "memory_allocated": lambda _: 0,
        "memory_snapshot": lambda: [
            {"device": 0, "segment_pool_id": (0, 1), "total_size": held, "allocated_size": 0}
        ],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    plan = Engine(make_aggregator()).plan(torch.float16)
    sizes = Sizes(plan, 5, (24, 24), 500, torch.device("cuda", 0))

    def choose() -> Schedule:
        return plan_schedule(sizes, policy="recompute", chunk=None, budget=None)

    alone = choose()
    assert alone.total_bytes <= 2**28
    held = 2**32
    assert choose() == alone
