"""The processes that torchrun has started for one command: their group, their devices, what they exchange."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from catseg_fast.console import stderr, stdout
from catseg_fast.errors import RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DAYS = timedelta(days=7)  # one process may be done long before another


@dataclass(frozen=True)
class Processes:
    """This process among those of a command; by default the only one."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """True if this process writes and prints."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(value)
            value /= self.count
        return value

    def barrier(self) -> None:
        """Wait for all."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """Return in every process what `compute` returns in the first one; raise what it raises there."""
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = compute()
            except (ValueError, OSError) as error:
                answer[1] = error
        if self.count > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, records: dict[str, Any]) -> dict[str, Any]:
        """Return in every process the records of all processes."""
        if self.count == 1:
            return records
        import torch.distributed as dist

        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, records)
        return {name: record for part in parts for name, record in part.items()}


@contextmanager
def join(device: str | torch.device, *, objects: bool = False, needed_by: str = "") -> Iterator[Processes]:
    """Join the processes that torchrun has started; leave them at the end unless an error ends the block.

    Every process but the first is silent inside. An error that leaves the block is printed by every rank.

    Args:
        device: where the model runs, `own_device(...)`; nccl is used between GPUs, gloo else.
        objects: exchange Python objects on the CPU, with days of patience, rather than tensors on the device.
        needed_by: the option that cannot do without torchrun; by default a single process is enough.

    Raises:
        RunError: if `needed_by` is given and torchrun did not start this process.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if needed_by and missing:
        raise RunError(
            f"{needed_by}: torchrun must start the processes (torchrun --nproc-per-node N -m catseg_fast "
            f"segment …); {missing[0]} is not set"
        )
    if not needed_by and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    import torch
    import torch.distributed as dist

    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if objects:
        dist.init_process_group("gloo", timeout=DAYS)
    else:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stdout.quiet = stderr.quiet = dist.get_rank() > 0
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
        dist.destroy_process_group()  # waits for the others, so not after an error
    finally:
        stdout.quiet = stderr.quiet = False


def own_device(device: str) -> str:
    """Return this process's device: under torchrun its own GPU where "cuda" has no index."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device
