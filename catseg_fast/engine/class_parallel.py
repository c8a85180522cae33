"""One vocabulary split over processes: each rank of a process group aggregates a share of the classes.

Ranks communicate at three points only. The sums of a class memory, whose size does not depend on the number
of classes, are added up over the ranks once per layer. Scores for the selection of a crop's best classes are
gathered. Label maps are merged by maximum. Each rank does everything else by itself, under its own memory
policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from catseg_fast.engine.class_memory import ClassMemory, LinearMemory
from catseg_fast.engine.selection import best_classes
from catseg_fast.errors import CATSegError, InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, ReduceOp

    from catseg_fast.inference.readout import LabelMap, TopClasses

SOFTMAX = (
    "class parallel: attention_type 'full' needs the key and value of every class, which no sum over ranks "
    "can replace; expected 'linear'"
)


class RankError(CATSegError, RuntimeError):
    """The ranks of a process group cannot continue: one failed or ended, or they were called differently."""


@dataclass(frozen=True)
class ClassShare:
    """This rank's share of the classes, and its communication with the other ranks.

    All ranks must hold the same weights, and call the same methods in the same order.

    Attributes:
        classes: names of all classes.
        group: the process group; None for all processes.
    """

    classes: tuple[str, ...]
    group: ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """Number of processes in the group."""
        return dist.get_world_size(self.group)

    @property
    def total(self) -> int:
        """Number of classes T of all ranks."""
        return len(self.classes)

    @property
    def own(self) -> slice:
        """Indices of this rank's classes.

        Ranks hold classes in order. If they cannot be divided evenly, the first ranks hold one class more;
        with fewer classes than ranks, the last ranks hold none.
        """
        each, rest = divmod(self.total, self.ranks)
        start = self.rank * each + min(self.rank, rest)
        return slice(start, start + each + (self.rank < rest))

    @cached_property
    def _names(self) -> str:
        return hashlib.blake2b(repr(self.classes).encode()).hexdigest()

    @contextmanager
    def together(self, device: torch.device, *facts: object) -> Iterator[None]:
        """Check that all ranks make the same call, and turn any error inside into one that names the rank.

        The other ranks time out waiting for a rank that fails.

        Args:
            device: device of the ranks' tensors.
            facts: values that must be the same on all ranks, besides the classes.

        Raises:
            RankError: if they differ, or anything is raised inside.
        """
        try:
            self._check_same(device, repr((self._names, facts)))
            yield
        except RankError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RankError(f"class parallel: rank {self.rank} of {self.ranks} failed: {reason}") from error

    def all_true(self, flag: bool, device: torch.device) -> bool:
        """Check whether a flag is set on all ranks."""
        least = torch.tensor(int(flag), device=device)
        self._reduce(least, dist.ReduceOp.MIN)
        return bool(least)

    def add_up(self, memory: ClassMemory, crops: int, positions: int, like: Tensor) -> None:
        """Add up a class memory over all ranks, each of which has added its own classes.

        Args:
            memory: a `LinearMemory`, which may be empty.
            crops, positions: B and hw of the memory.
            like: a tensor `[…, C]` of the classes' type and device.

        Raises:
            InputError: if the memory is that of softmax attention, which is not a sum.
            RankError: if a rank has ended.
        """
        if not isinstance(memory, LinearMemory):
            raise InputError(SOFTMAX)
        heads, dtype = memory.heads, torch.promote_types(like.dtype, torch.float32)
        d = like.shape[-1] // heads

        def total(part: Tensor | float, *sizes: int) -> Tensor:
            part = torch.as_tensor(part, dtype=dtype, device=like.device)
            part = part.expand(crops, positions, heads, *sizes).contiguous()
            self._reduce(part, dist.ReduceOp.SUM)
            return part

        memory.key_value, memory.key_sum = total(memory.key_value, d, d), total(memory.key_sum, d)

    def select(self, scores: Tensor, count: int) -> list[Tensor]:
        """Return this rank's part of the `count` best classes of all ranks.

        Args:
            scores: scores of this rank's classes, `[B, t]`.
            count: number of classes that each crop aggregates on all ranks.

        Returns:
            For each crop, indices `[1, n]` into this rank's classes, ascending; n differs, and may be 0.
        """
        every = scores.new_zeros(len(scores), self.total)
        every[:, self.own] = scores
        self._reduce(every, dist.ReduceOp.SUM)
        best = best_classes(every, count)
        start, stop = self.own.start, self.own.stop
        return [kept[None, (kept >= start) & (kept < stop)] - start for kept in best]

    def merge(self, target: LabelMap | TopClasses, count: int) -> None:
        """Merge the targets of all ranks, each of which holds the best of its own classes.

        Score and class are packed into one number, which is larger for a better score, and among equal scores
        for the first class. The best class of all ranks is the maximum, the next one is the maximum of the
        rest, and so on.

        Args:
            target: target of this rank's classes, numbered over all ranks; a class with several names can be
                on two ranks. It then holds the best `count` classes of all ranks.
            count: classes per pixel: at most T, and 1 for a `LabelMap`.
        """
        keys = _pack(target.scores, target.labels).view(-1, *target.scores.shape[-2:])
        none = keys.new_full((1, *keys.shape[1:]), torch.iinfo(keys.dtype).min)
        keys = torch.cat([keys, none])  # so that there is a largest one
        best = []
        for _ in range(count):
            largest = keys.amax(dim=0)
            self._reduce(largest, dist.ReduceOp.MAX)
            best.append(largest)
            keys = torch.where(keys % _LABELS == largest % _LABELS, none, keys)
        target.scores, target.labels = _unpack(torch.stack(best).view(-1, *target.scores.shape[1:]))

    def _check_same(self, device: torch.device, facts: str) -> None:
        digest = int.from_bytes(hashlib.blake2b(facts.encode(), digest_size=7).digest(), "big")
        largest = torch.tensor([digest, -digest], device=device)
        self._reduce(largest, dist.ReduceOp.MAX)
        if largest[0] != -largest[1]:
            raise RankError("class parallel: the ranks were given different images, classes or settings")

    def _reduce(self, tensor: Tensor, operation: ReduceOp.RedOpType) -> None:
        with waiting(self.group):
            dist.all_reduce(tensor, operation, self.group)


@contextmanager
def waiting(group: ProcessGroup | None) -> Iterator[None]:
    """Turn a timeout of the group's communication into an error that names the rank.

    Raises:
        RankError: if a rank has ended, or takes longer than the group's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        raise RankError(
            f"class parallel: rank {rank} of {ranks} timed out waiting for the others, one of which has "
            f"ended or hangs: {error}"
        ) from error


_LABELS = 2**32  # twice the number of labels: none has the sign bit of an int32


def _pack(scores: Tensor, labels: Tensor) -> Tensor:
    """Pack scores (at least 0) and labels into int64, by ascending score, NaN last, then descending label."""
    bits = torch.where(scores.isnan(), scores.new_tensor(torch.nan), scores).view(torch.int32)
    return bits.long() * _LABELS + (_LABELS // 2 - 1 - labels)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores (float32) and the labels (int32) of keys."""
    bits = keys.div(_LABELS, rounding_mode="floor")
    return bits.int().view(torch.float32), (_LABELS // 2 - 1 - keys % _LABELS).int()
