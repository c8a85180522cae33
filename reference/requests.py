"""Checks of the argument of a call with upstream's contract, `model(batched_inputs)`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from catseg_fast.errors import InputError, InputTypeError

HINT = "; segment() takes a single picture"


def check_requests(batched_inputs: Sequence[dict[str, Any]], divisor: int | None = None) -> None:
    """Check the argument of a call.

    Args:
        batched_inputs: a list of dicts: "image", a tensor `[3, H, W]`; "height" and "width", positive
            integers that may be missing; in training "sem_seg", a tensor of integers `[H, W]`. Images of a
            batch are padded to the largest one; labels may have that size, or its next multiple of `divisor`.
        divisor: divisor of the padded images' height and width in training; else None.

    Raises:
        InputTypeError, InputError: if it is anything else; the message names the entry and the key.
    """
    if isinstance(batched_inputs, dict | str | Tensor) or not isinstance(batched_inputs, Sequence):
        kind = type(batched_inputs).__name__
        hint = "" if isinstance(batched_inputs, dict) else HINT
        raise InputTypeError(f"batched_inputs: expected a list of dicts, got {kind}{hint}")
    for index, entry in enumerate(batched_inputs):
        name = f"batched_inputs[{index}]"
        if not isinstance(entry, dict):
            raise InputTypeError(f"{name}: expected a dict with an 'image', got {type(entry).__name__}{HINT}")
        for key in ("image",) if divisor is None else ("image", "sem_seg"):
            if key not in entry:
                raise InputError(f"{name}[{key!r}]: is missing; the entry has {sorted(map(str, entry))}")
            if not isinstance(entry[key], Tensor):
                shape = "[3, H, W]" if key == "image" else "[H, W]"
                kind = type(entry[key]).__name__
                hint = HINT if key == "image" else ""
                raise InputTypeError(f"{name}[{key!r}]: expected a tensor {shape}, got {kind}{hint}")
        image = entry["image"]
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise InputError(f"{name}['image']: shape {tuple(image.shape)} is not [3, H, W]")
        for key in ("height", "width"):
            side = entry.get(key, 1)
            try:
                if isinstance(side, bool):
                    raise TypeError
                positive = operator.index(side) > 0
            except TypeError:
                raise InputTypeError(f"{name}[{key!r}]: expected an integer, got {side!r}") from None
            if not positive:
                raise InputError(f"{name}[{key!r}]: {side} is not positive")
    if divisor is not None:
        _check_label_sizes(batched_inputs, divisor)


def _check_label_sizes(batched_inputs: Sequence[dict[str, Any]], divisor: int) -> None:
    sizes = [tuple(entry["image"].shape[1:]) for entry in batched_inputs]
    largest = tuple(max(sides) for sides in zip(*sizes, strict=True))
    padded = tuple(-(-side // divisor) * divisor for side in largest) if divisor > 1 else largest
    for index, (entry, size) in enumerate(zip(batched_inputs, sizes, strict=True)):
        found = tuple(entry["sem_seg"].shape)
        if found not in (size, largest, padded):
            expected = " or ".join(map(str, dict.fromkeys((size, largest, padded))))
            raise InputError(
                f"batched_inputs[{index}]['sem_seg']: shape {found}; expected [H, W] = {expected}"
            )
