"""The processes that torchrun has started for one command: their group, their devices, and who speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from catseg_fast.backend import default_device
from catseg_fast.console import stderr, stdout

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process_group(wanted: bool, device: str | None) -> Iterator[str | None]:
    """Join the processes that torchrun has started, and leave them at the end; nothing if not `wanted`.

    All but rank 0 are silent inside. An error that leaves the block is said by every rank.

    Args:
        wanted: whether to.
        device: where the model goes; None for a GPU if there is one.

    Yields:
        The device of this process: a GPU of its own where GPUs are asked for by no number.

    Raises:
        RuntimeError: if torchrun did not start this process.
    """
    if not wanted:
        yield device
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise RuntimeError(
            "--class-parallel: torchrun must start the processes (torchrun --nproc-per-node N -m catseg_fast "
            f"segment …); {missing[0]} is not set"
        )
    import torch.distributed as dist

    device = own_device(device or default_device().type)
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    stdout.quiet = stderr.quiet = dist.get_rank() > 0
    try:
        yield device
        dist.destroy_process_group()  # which waits for the others: not after an error
    finally:
        stdout.quiet = stderr.quiet = False


def own_device(device: str) -> str:
    """The device of this process: a GPU of its own under torchrun, where GPUs are asked for by no number."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def is_first() -> bool:
    """Whether this process reads, writes and speaks: rank 0 of a group, or the only one."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
