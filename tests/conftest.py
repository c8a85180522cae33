"""Without a GPU, Triton kernels run in its interpreter; the mode is fixed when a kernel is decorated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Read when torch and numpy are imported, here and in the processes that tests start. Threads that spin while
# they wait take ten times as long where processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = str(max(1, len(os.sched_getaffinity(0)) // int(workers)))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", threads)

import torch
from torch import Tensor

GPU = torch.cuda.is_available()

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What plain torch computes is what the kernels are measured by.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

os.environ.pop(
    "COLUMNS", None
)  # which pytest-xdist sets to the terminal's; tables are made for a fixed width


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--upstream", metavar="FOLDER", help="a checkout of upstream, for the tests marked so")


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Let new tensors be on the GPU, where there is one."""
    with torch.device("cuda" if GPU else "cpu"):
        yield


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the kernels allocate with NaN."""
    new_empty = Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = new_empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture
def gpu_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let convolutions in the interpreter have a GPU's default tiles, not those that it likes."""
    from catseg_fast.kernels import convolution  # decorated when it is imported

    monkeypatch.setattr(
        convolution, "interpreter_config", lambda size, dtype: convolution.default_config(size, dtype, 90)
    )
