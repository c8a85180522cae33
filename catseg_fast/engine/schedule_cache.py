"""Schedules that are used again, because asking a GPU for its free memory takes longer than a kernel."""

from __future__ import annotations

import torch

from catseg_fast.engine.schedule import Schedule, Sizes, plan_schedule

AMPLE = 4
MOST = 64  # schedules that are kept


class ScheduleCache:
    """Makes schedules as `plan_schedule` does, and keeps those that will still fit.

    A call that needs less than 1/AMPLE of the memory that was free is scheduled without asking again, as is
    one within a given budget; if memory does run out, the stream continues in smaller steps.
    """

    def __init__(self) -> None:
        self._kept: dict[object, Schedule] = {}

    def __call__(
        self, sizes: Sizes, *, policy: str | None, chunk: int | None, budget: int | None, output_bytes: int
    ) -> Schedule:
        """Return a schedule; arguments and errors as of `plan_schedule`."""
        needs = (sizes.state_bytes, sizes.fixed_bytes, sizes.class_bytes, output_bytes)
        key = (sizes.crops, sizes.classes, sizes.device, needs, policy, chunk, budget)
        if not torch.compiler.is_compiling() and key in self._kept:
            return self._kept[key]
        schedule = plan_schedule(sizes, policy=policy, chunk=chunk, budget=budget, output_bytes=output_bytes)
        ample = sizes.device.type == "cuda" and schedule.total_bytes * AMPLE < schedule.budget
        if ample or (budget is not None and schedule.policy == "resident"):
            if len(self._kept) >= MOST:
                self._kept.clear()
            self._kept[key] = schedule
        return schedule
