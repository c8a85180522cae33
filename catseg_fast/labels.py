"""Label maps as class indices: one conversion and one check, before anything is compared."""

from __future__ import annotations

import torch
from torch import Tensor

from catseg_fast.errors import InputError, InputTypeError
from catseg_fast.numeric import real

# Of pixels whose best probability is below `min_score`. A stored label map has its type's largest value there
# (65535 in 16 bits, 255 in 8 bits), as annotations have where no class is right.
NONE = -1
NONE_NAME = "none of these"


def class_indices(
    labels: Tensor, classes: int, ignore_label: int | None = None, name: str = "labels"
) -> Tensor:
    """Return labels as int64, of the same shape and on the same device.

    PyTorch casts a number to a tensor's type before it compares them: in uint8, 255 equals 65535, and 50 is
    not below 300. Every comparison of labels must come after this function.

    Args:
        labels: of any integer type, or bool.
        classes: number of classes.
        ignore_label: label of pixels that belong to no class; None if every pixel belongs to one.
        name: what an error calls the labels.

    Raises:
        InputTypeError: if they are not a tensor of integers.
        InputError: if a label is neither a class index nor the ignore label.
    """
    if not isinstance(labels, Tensor):
        raise InputTypeError(f"{name}: expected a tensor of integers, got {type(labels).__name__}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise InputTypeError(f"{name}: expected integers, got {labels.dtype}")
    indices = labels.to(torch.int64)
    wrong = (indices < 0) | (indices >= classes)
    if ignore_label is not None:
        wrong &= indices != ignore_label
    if wrong.any():
        expected = f"one of {classes} classes"
        if ignore_label is not None:
            expected += f" or the ignore label {ignore_label}"
        raise InputError(f"{name}: {int(indices[wrong][0])} is not {expected}")
    return indices


def check_min_score(value: float, name: str = "min_score") -> float:
    """Return a threshold of probabilities after a check.

    Raises:
        InputTypeError: if it is not a number.
        InputError: if it is not in 0..1.
    """
    number = real(value, name)
    if not 0 <= number <= 1:
        raise InputError(f"{name}: expected a probability in 0..1, got {number}; 0 labels every pixel")
    return number
