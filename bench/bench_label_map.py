"""Label maps from logits: chunk by chunk, or as the argmax of all probabilities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.cases import CROPS
from bench.gate import WrongAnswer
from bench.meter import Meter
from catseg_fast import SlidingWindow
from catseg_fast.engine.schedule import usual_chunk
from catseg_fast.inference.readout import LabelMap, Probabilities, Readout, reader

RUNS = ("probabilities and argmax", "label map, torch", "label map, Triton")


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def bench_label_map(meter: Meter, full: bool, run: str) -> None:
    device = meter.device
    if run.endswith("Triton") and device.type == "cpu":
        pytest.skip("Triton's interpreter is never timed; a GPU is needed")
    classes, size = (847, (1024, 2048)) if full else (16, (256, 512))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    readout = Readout(size, SlidingWindow())
    logits = make_logits(classes, dtype, device)
    read = make_read(readout, logits, run)
    expected, labels = make_read(readout, logits, RUNS[0])(), read()
    agreement = (labels == expected).float().mean().item()
    if agreement < 0.9999:  # the kernel rounds in another order: almost equal scores may change places
        raise WrongAnswer(f"no speed for a wrong answer: {agreement:.2%} of the labels agree")
    del expected
    meter(
        torch.no_grad()(read),
        group="label map",
        case=f"{size[0]}x{size[1]}, T={classes}, B={CROPS}",
        run=run,
        dtype=dtype,
        remake=(prepare, readout, classes, run),
        classes=classes,
        least_bytes=logits.nbytes + labels.nbytes,
    )


def make_logits(classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return logits, the same every time."""
    torch.manual_seed(0)
    return torch.randn(CROPS, classes, 96, 96, device=device).to(dtype)


def prepare(readout: Readout, classes: int, run: str) -> Callable[[], Tensor]:
    """Return the same call on the CPU; the logits are an input, and only the labels are its own memory."""
    logits = make_logits(classes, torch.float32, torch.device("cpu"))
    return torch.no_grad()(lambda: make_read(readout, logits, run)())


def make_read(readout: Readout, logits: Tensor, run: str) -> Callable[[], Tensor]:
    """Return the function that turns `logits [B, T, h, w]` into labels `[H, W]`."""
    (B, T), device = logits.shape[:2], logits.device
    target: Probabilities | LabelMap = LabelMap(readout.size, device)
    if run == RUNS[0]:
        target = Probabilities(T, readout.size, device)
    chunk = usual_chunk(T, B, device)

    def read() -> Tensor:
        consume = reader(readout, target, "triton" if run.endswith("Triton") else "torch")
        for start in range(0, T, chunk):
            part = slice(start, min(start + chunk, T))
            consume(part, logits[:, part])
        return target.maps.argmax(dim=0) if isinstance(target, Probabilities) else target.labels

    return read
