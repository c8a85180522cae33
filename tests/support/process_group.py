"""Process groups of `torch.distributed` for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def single_process_group(folder: Path) -> Iterator[None]:
    """Run inside a process group of this process only; its store is in `folder`."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
