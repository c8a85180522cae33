"""One vocabulary over several processes: each rank of a process group aggregates a share of the classes.

Classes meet in three places alone. The sums of a class memory, whose size does not depend on the number of
classes, are added up over the ranks, once per layer. Scores by which a crop's best classes are selected are
gathered. Label maps are merged by maximum. All else a rank does alone, under its own memory policy.
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
    "class parallel: attention_type 'full' needs the key and value of every class, and no sum over ranks "
    "can stand for them; 'linear' is wanted"
)


class RankError(CATSegError, RuntimeError):
    """The ranks of a process group cannot go on: one has failed or is gone, or they do different things."""


@dataclass(frozen=True)
class ClassShare:
    """This rank's share of the classes, and what it has to do together with the others.

    All ranks must hold the same weights, and call the same methods in the same order.

    Attributes:
        classes: the names of all classes.
        group: the process group; None for all processes.
    """

    classes: tuple[str, ...]
    group: ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """Processes of the group."""
        return dist.get_world_size(self.group)

    @property
    def total(self) -> int:
        """Classes T of all ranks."""
        return len(self.classes)

    @property
    def own(self) -> slice:
        """The indices of this rank's classes. Ranks hold them in order; the first ones hold one more where
        they do not come out even, the last ones none where there are fewer classes than ranks.
        """
        each, rest = divmod(self.total, self.ranks)
        start = self.rank * each + min(self.rank, rest)
        return slice(start, start + each + (self.rank < rest))

    @cached_property
    def _names(self) -> str:
        return hashlib.blake2b(repr(self.classes).encode()).hexdigest()

    @contextmanager
    def together(self, device: torch.device, *facts: object) -> Iterator[None]:
        """Make sure that all ranks are about to do the same, and turn any error inside into one that says
        which rank failed: the others time out waiting for it.

        Args:
            device: where the ranks' tensors are.
            facts: what must be the same on all ranks, besides the classes.

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
        """Whether a flag is set on all ranks."""
        least = torch.tensor(int(flag), device=device)
        self._reduce(least, dist.ReduceOp.MIN)
        return bool(least)

    def add_up(self, memory: ClassMemory, crops: int, positions: int, like: Tensor) -> None:
        """Let a class memory hold the classes of all ranks, where each has added its own.

        Args:
            memory: a `LinearMemory`; whether any class was added to it or not.
            crops, positions: B and hw of the memory.
            like: a tensor `[…, C]` of the classes' type and device.

        Raises:
            InputError: if the memory is one of softmax attention, which no sums stand for.
            RankError: if a rank is gone.
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
        """Those of the `count` best classes of all ranks that are this rank's.

        Args:
            scores: of this rank's classes, `[B, t]`.
            count: classes that each crop aggregates on all ranks.

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
        """Let a target hold the best `count` classes of all ranks, where each has taken in its own.

        Score and class make one number, the larger the better, and of equal scores the larger for the first
        class. The best of all ranks is the maximum, the next one that of what is then left, and so on.

        Args:
            target: of this rank's classes, counted over all ranks. A class with several names can be on two
                ranks.
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
    """Around what a group does together.

    Raises:
        RankError: if a rank is gone, or takes longer than the group's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        raise RankError(
            f"class parallel: rank {rank} of {ranks} timed out waiting for the others, one of which has "
            f"ended or hangs: {error}"
        ) from error


_LABELS = 2**32  # twice as many as there are: none has the sign bit of an int32


def _pack(scores: Tensor, labels: Tensor) -> Tensor:
    """One int64 for each score, not below 0, and label: ordered by score, NaN last, then by label down."""
    bits = torch.where(scores.isnan(), scores.new_tensor(torch.nan), scores).view(torch.int32)
    return bits.long() * _LABELS + (_LABELS // 2 - 1 - labels)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The scores, float32, and the labels, int32, of keys."""
    bits = keys.div(_LABELS, rounding_mode="floor")
    return bits.int().view(torch.float32), (_LABELS // 2 - 1 - keys % _LABELS).int()
