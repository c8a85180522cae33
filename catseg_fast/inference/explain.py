"""Description of the way a model's call runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from catseg_fast.backend import choose_backend
from catseg_fast.engine.schedule import format_bytes
from catseg_fast.environment import describe_compiler, describe_configs
from catseg_fast.inference.encoding import image_type
from catseg_fast.inference.readout import READOUT_BYTES

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg


def explain(model: CATSeg, crops: int | None = None) -> str:
    """Return lines on back end, classes, precision, policy, step and memory, for `CATSeg.explain`."""
    total, limit, share = len(model.classes), model.max_classes, model.engine.share
    kept = total if limit is None else min(total, limit)
    crops = crops or (model.window.count if model.sliding_window else 1)
    backend = choose_backend(model.backend, model.device)
    lines = {"back end": f"{backend} (asked for: {model.backend})"}
    lines["classes"] = f"{total}, all aggregated" if kept == total else f"{total}, the best {kept} per crop"
    if share is not None:
        own = share.own.stop - share.own.start
        lines["ranks"] = f"{share.ranks}; rank {share.rank}, this one, has {own} of the classes"
        kept = min(kept, own)
    if backend != "reference":
        resolution = model.variant.feature_resolution
        schedule = model.engine.schedule(
            crops, resolution, kept, READOUT_BYTES, limit is not None and total > limit
        )
        plan = model.engine.plan()
        lines["precision"] = str(plan.embed.dtype).removeprefix("torch.")
        if (dtype := image_type(model)) != plan.embed.dtype:
            lines["precision"] += f"; CLIP {str(dtype).removeprefix('torch.')}"
        for stage, reason in getattr(model.engine.stages(plan), "fallbacks", {}).items():
            lines["in torch"] = "; ".join(filter(None, [lines.get("in torch"), f"{stage} ({reason})"]))
        if backend == "triton" and model.device.type == "cuda":
            lines["configs"] = describe_configs(model.device, plan.embed.dtype)
            lines["compiler"] = describe_compiler(model.device)
        lines["graphs"] = f"{model.engine.graphs}; {model.engine.recordings.describe()}"
        lines["policy"] = f"{schedule.policy}: {schedule.reason}"
        steps, origin = -(-kept // schedule.chunk), "asked for" if model.engine.chunk else "chosen"
        lines["step"] = f"{schedule.chunk} classes of {crops} crops"
        lines["steps"] = f"{steps} for {kept} classes, {origin}"
        lines["memory"] = (
            f"{format_bytes(schedule.total_bytes)} above weights, inputs and answer "
            f"({format_bytes(schedule.fixed_bytes)} + {format_bytes(schedule.class_bytes)} a class in a "
            f"step); the budget is {format_bytes(schedule.budget)}"
        )
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())
