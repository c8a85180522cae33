"""Schedule of a call: the memory policy and the classes per step, from the memory that the call takes."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from fractions import Fraction

import torch

from catseg_fast.engine.folding import Plan
from catseg_fast.engine.free_memory import free_bytes
from catseg_fast.errors import InputError, shortened
from catseg_fast.numeric import whole

POLICIES = ("resident", "offload", "recompute")

# Crops times classes per step: enough to hide the host's work on a GPU, few enough for a CPU's cache.
CROP_CLASSES = {"cpu": 8, "cuda": 1024}

# Rows of a GPU tile in the class attention: a step pads its classes to a multiple.
TILE = 64

# Share of the free memory that a call takes by default; with gradients, the loss needs some, too.
FREE_SHARE = 0.8
GRADIENT_SHARE = 0.5

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Schedule:
    """Memory policy and step size of a call.

    Attributes:
        policy: where the state of all classes is kept: on the device ("resident"), in host memory
            ("offload"), or nowhere ("recompute"). With gradients, whether activations are kept ("keep") or
            computed again ("checkpoint").
        chunk: classes per step.
        reason: reason for this policy.
        fixed_bytes: memory independent of the chunk: state on the device, class memories, image terms, and
            the caller's output.
        class_bytes: working memory of each class in a step.
        budget: bytes that the call may take.
    """

    policy: str
    chunk: int
    reason: str
    fixed_bytes: int
    class_bytes: int
    budget: int

    @property
    def total_bytes(self) -> int:
        """Estimated peak besides weights and inputs."""
        return self.fixed_bytes + self.chunk * self.class_bytes


def parse_bytes(amount: float | str) -> int:
    """Return a number of bytes from a number or a text such as "2GiB", "500 MB", "1.5G".

    Raises:
        InputError, InputTypeError: if it is not an amount, or not positive.
    """
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", amount.lower())
        units = _UNITS | _BINARY_UNITS
        if match is None or match[2] not in units:
            raise InputError(f"memory_budget: {shortened(amount)} is not an amount such as '2GiB' or '500MB'")
        amount = int(Fraction(match[1]) * units[match[2]])
    elif isinstance(amount, float) and math.isfinite(amount):  # 2e9
        amount = int(amount)
    return whole(amount, "memory_budget")


def format_bytes(amount: int) -> str:
    """Format a number of bytes in the largest binary unit below it."""
    value, unit = float(amount), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def check_policy(policy: str | None) -> str | None:
    """Return a known policy, or None for the engine's choice.

    Raises:
        InputError: if it is not one of `POLICIES`.
    """
    if policy is not None and policy not in POLICIES:
        raise InputError(f"policy: {policy!r} is not one of {', '.join(POLICIES)}")
    return policy


def check_chunk(chunk: int | None) -> int | None:
    """Return a positive number of classes per step, or None for the engine's choice.

    Raises:
        InputError, InputTypeError: if it is not a positive number.
    """
    return None if chunk is None else whole(chunk, "chunk")


@dataclass(frozen=True)
class Sizes:
    """Sizes that a call's memory depends on.

    Attributes:
        plan: the folded weights.
        crops: number of crops B.
        resolution: (H, W) of the features.
        classes: number of classes T that are aggregated.
        device: device of the tensors.
        selects: whether each crop aggregates its own selection of classes, whose logits are then held.
    """

    plan: Plan
    crops: int
    resolution: tuple[int, int]
    classes: int
    device: torch.device
    selects: bool = False

    @property
    def positions(self) -> int:
        """Number of positions of all crops."""
        return self.crops * self.resolution[0] * self.resolution[1]

    @property
    def state_bytes(self) -> int:
        """Size of the state `[B, T, HW, C]`."""
        return self.positions * self.classes * self.plan.channels * self.plan.embed.itemsize

    @property
    def fixed_bytes(self) -> int:
        """Size of class memories in fp32 (one of them twice, for sums), image terms, and selected logits."""
        channels, layers = self.plan.channels, self.plan.layers
        heads = [layer.classes.heads for layer in layers]
        memories = sum(channels * (channels // count + 1) * 4 for count in [*heads, *heads[:1]])
        first, second = (stage.conv.shape[0] for stage in self.plan.decoder)
        guidance = 2 * 2 * channels * len(layers) + 4 * first + 16 * second
        logits = 16 * 2 * (self.classes + 1) if self.selects else 0  # twice while chunks are joined
        return self.positions * (memories + (guidance + logits) * self.plan.embed.itemsize)

    @property
    def class_bytes(self) -> int:
        """Working memory of one class of all crops in the stage that needs most."""
        plan = self.plan
        hidden = max((block.fc1.shape[0] for layer in plan.layers for block in layer.blocks), default=0)
        attention = plan.channels * 4 + 2 * hidden  # input, output, residual, normalised; around GELU
        embedding = plan.prompts * 2 + plan.channels * 2 + (49 if plan.prompts == 1 else 0)
        first, second = (stage.conv.shape[0] for stage in plan.decoder)
        decoder = max(plan.channels + 4 * 3 * first, 4 * first + 16 * 3 * second)
        return self.positions * max(attention, embedding, decoder) * plan.embed.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Memory that the gradients need for one class of all crops."""
        plan, C = self.plan, self.plan.channels
        kept = plan.prompts * 2 + C + (49 if plan.prompts == 1 else 0)
        for layer in plan.layers:
            # Two normalised inputs; queries, keys and values in order and by head; attended values; the sum.
            kept += sum(11 * C + 2 * block.fc1.shape[0] for block in layer.blocks)
            pooling = layer.classes.pooling or (1, 1)
            kept += C + (14 * C + layer.classes.fc1.shape[0]) // (pooling[0] * pooling[1])
        first, second = (stage.conv.shape[0] for stage in plan.decoder)
        kept += 4 * 5 * first + 16 * 5 * second
        return self.positions * kept * plan.embed.itemsize

    @property
    def copy_bytes(self) -> int:
        """Size of buffers for copies of one class of all crops from and to host memory (`OffloadedState`)."""
        return 2 * self.positions * self.plan.channels * self.plan.embed.itemsize


def plan_schedule(
    sizes: Sizes, *, policy: str | None, chunk: int | None, budget: int | None, output_bytes: int = 0
) -> Schedule:
    """Choose the settings that the caller left open.

    While `torch.compile` traces, free memory is unknown and steps are unrolled: without a budget, all classes
    are computed in one step.

    Args:
        sizes: sizes of the call.
        policy, chunk: the caller's choice, or None.
        budget: bytes, or None for a share of the free memory.
        output_bytes: memory that the caller holds for the answer.

    Raises:
        InputError: if the budget is too small for one class; the message has the smallest one that works.
    """
    device, classes = sizes.device, sizes.classes
    if budget is None and torch.compiler.is_compiling():
        return Schedule(policy or "resident", chunk or classes, "a graph is made", 0, 0, sys.maxsize)
    state = sizes.state_bytes
    free = budget if budget is not None else int(free_bytes(device) * FREE_SHARE)
    always, per_class = sizes.fixed_bytes + output_bytes, sizes.class_bytes
    fixed = {
        "resident": always + state,
        "offload": always + (0 if device.type == "cuda" else state),
        "recompute": always,
    }
    chunk = chunk and min(chunk, classes)
    wanted = chunk or usual_chunk(classes, sizes.crops, device)
    if policy is not None:
        chosen, reason = policy, "asked for"
    elif fixed["resident"] + wanted * per_class <= free:
        chosen, reason = "resident", f"the state of {classes} classes fits"
    elif device.type == "cuda" and state <= free_bytes(torch.device("cpu")) * FREE_SHARE:
        chosen, reason = "offload", f"the state of {classes} classes fits only in host memory"
    else:
        chosen, reason = "recompute", f"the state of {classes} classes does not fit"
    if chosen == "offload":
        per_class += sizes.copy_bytes
    room, least = (free - fixed[chosen]) // per_class, chunk or 1
    if room < least:
        needed = (min(fixed.values()) if policy is None else fixed[chosen]) + least * per_class
        raise InputError(
            f"memory_budget: {format_bytes(free)} does not hold {least} of {classes} classes "
            f"(policy {chosen!r}); the least that works is {format_bytes(needed)} ({needed} bytes)"
        )
    step = wanted if wanted <= room else _whole_tiles(room, device)
    return Schedule(chosen, step, reason, fixed[chosen], per_class, free)


def plan_gradients(
    sizes: Sizes, *, checkpoint: bool | None, chunk: int | None, budget: int | None
) -> Schedule:
    """Choose the settings of a call with gradients that the caller left open.

    While `torch.compile` traces, nothing is computed again unless the caller requests it.

    Args:
        sizes: sizes of the call.
        checkpoint: whether to compute activations again in the backward pass; None: only if those of all
            classes do not fit.
        chunk: the caller's choice, or None.
        budget: bytes, or None for a share of the free memory.

    Raises:
        InputError: if the budget is too small for the caller's choice; the message has the smallest one that
            works.
    """
    classes = sizes.classes
    if budget is None and torch.compiler.is_compiling():
        chosen = "checkpoint" if checkpoint else "keep"
        return Schedule(chosen, chunk or classes, "a graph is made", 0, 0, sys.maxsize)
    chunk = chunk and min(chunk, classes)
    per_class = sizes.gradient_bytes
    free = budget if budget is not None else int(free_bytes(sizes.device) * GRADIENT_SHARE)
    wanted = chunk or usual_chunk(classes, sizes.crops, sizes.device)
    logits = 2 * 16 * sizes.positions * classes * sizes.plan.embed.itemsize  # and their gradient
    always = sizes.fixed_bytes * len(sizes.plan.layers) + logits
    everything = always + classes * per_class
    if checkpoint is None:
        checkpoint = everything > free
        reason = f"the activations of {classes} classes {'do not fit' if checkpoint else 'fit'}"
    else:
        reason = "asked for"
    if not checkpoint:
        if everything > free:
            raise InputError(
                f"memory_budget: {format_bytes(free)} does not hold the activations of {classes} classes, "
                f"{format_bytes(everything)}; checkpoint=True computes them again"
            )
        return Schedule("keep", wanted, reason, everything, 0, free)
    fixed = always + (len(sizes.plan.layers) + 1) * sizes.state_bytes  # and one's gradient
    room, least = (free - fixed) // per_class, chunk or 1
    if room < least:
        needed = fixed + least * per_class
        raise InputError(
            f"memory_budget: {format_bytes(free)} does not hold {least} of {classes} classes with gradients; "
            f"the least that works is {format_bytes(needed)} ({needed} bytes)"
        )
    return Schedule("checkpoint", min(wanted, room), reason, fixed, per_class, free)


def usual_chunk(classes: int, crops: int, device: torch.device) -> int:
    """Return the classes per step if memory suffices: all, or equal steps of whole tiles."""
    most = max(1, CROP_CLASSES.get(device.type, 8) // crops)
    if classes <= most:
        return max(1, classes)
    most = _whole_tiles(most, device)
    steps = -(-classes // most)
    return min(most, _round_up(-(-classes // steps), TILE)) if most >= TILE else most


def _whole_tiles(classes: int, device: torch.device) -> int:
    """Return at most `classes`, on a GPU a multiple of a tile, if it is at least one tile."""
    return classes if device.type == "cpu" or classes < TILE else classes // TILE * TILE


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
