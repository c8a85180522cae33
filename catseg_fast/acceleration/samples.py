"""Samples of tensors' values, by which it is noticed that they were written through `.data`.

Such a write leaves no trace in a tensor's version. Most of them change all values, such as averaged weights
that are put in, or a LoRA that is merged; so a few numbers of each tensor are compared, around its largest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Numbers of each tensor that are compared where this costs next to nothing, in a CPU's memory.
COUNT = 16

# Seconds between comparisons elsewhere: they wait for the device.
INTERVAL = 1.0


class Samples:
    """A snapshot of some values of tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        plain = [x.detach() for x in tensors if type(x) in (Tensor, nn.Parameter) and x.numel()]
        plain = [x for x in plain if x.layout == torch.strided and not (x.is_meta or x.is_quantized)]
        plain = [x for x in plain if not (x.is_conj() or x.is_neg())]
        self._near = [_around_largest(x).view(torch.uint8).numpy().data for x in plain if is_near(x)]
        self._bytes = b"".join(self._near)
        self._far: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for x in plain:
            if not is_near(x):
                self._far.setdefault((x.device, x.dtype), []).append(_around_largest(x)[:1])
        self._values = self._read()
        self._next = time.monotonic() + INTERVAL

    def same(self) -> bool:
        """Check that the values are as they were; on other devices than the CPU, once per `INTERVAL`."""
        return b"".join(self._near) == self._bytes and (not self._far or self._same_far())

    def _same_far(self) -> bool:
        if time.monotonic() < self._next or torch.cuda.is_current_stream_capturing():
            return True
        self._next = time.monotonic() + INTERVAL
        return self._read() == self._values

    def _read(self) -> list[bytes]:
        joined = [torch.cat(samples) for samples in self._far.values()]
        return [x.view(torch.uint8).cpu().numpy().tobytes() for x in joined]


def is_near(x: Tensor) -> bool:
    """Check whether the CPU reads a tensor's values without waiting."""
    return x.device.type == "cpu"


def _around_largest(x: Tensor) -> Tensor:
    """A view of some numbers of a tensor in a row, with its largest one among them."""
    if x.is_complex():
        x = torch.view_as_real(x)
    if not x.is_contiguous():
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        x = x.permute(order)
    if not x.is_contiguous():
        return x[tuple(size // 2 for size in x.shape)].view(1)
    place = int(x.abs().argmax()) if x.is_floating_point() and x.itemsize > 1 else x.numel() // 2
    return x.reshape(-1)[max(0, place - COUNT // 2) :][:COUNT]
