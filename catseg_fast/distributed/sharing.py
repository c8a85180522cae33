"""The processes that share an evaluation: torchrun's, or one alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Sharing:
    """This process among those that share the work; what they exchange is small, and on the CPU."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> Sharing:
        """Meet the others that torchrun has started."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))  # one may be done long before another
        return cls(dist.get_rank(), count)

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns or raises in the first process, in all of them."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = compute()
            except (ValueError, OSError) as error:
                answer[1] = error
        if self.count > 1:
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, records: dict[str, Any]) -> dict[str, Any]:
        """The records of all processes, in all of them."""
        if self.count == 1:
            return records
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, records)
        return {name: record for part in parts for name, record in part.items()}
