"""Label maps in Triton against `Readout` and `LabelMap` in float64; labels only where scores differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from catseg_fast.inference.readout import LabelMap, Readout, reader
from catseg_fast.kernels.label_map import op as label_map
from catseg_fast.reference.inference import SlidingWindow, resize
from support.accuracy import assert_no_worse_than_eager

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
READOUTS = [
    Readout((13, 17)),
    Readout((24, 24)),
    Readout((40, 9), visible=(20, 15)),
    Readout((13, 17), SlidingWindow(8, 0.25, (20, 26))),
    Readout((50, 31), SlidingWindow(16, 0.333, (16, 27))),
    Readout((20, 26), SlidingWindow(12, 0.5, (20, 26))),
    Readout((40, 9), visible=(50, 15)),
]


def make_logits(readout: Readout, classes: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    crops = 1 if readout.window is None else len(readout.window.corners()) + 1
    logits = 3 * torch.randn(crops, classes, 24, 24, generator=torch.Generator().manual_seed(classes))
    return logits.to(DEVICE, dtype)


def exact(readout: Readout, logits: Tensor) -> Tensor:
    """Return probabilities `[t, H, W]` in float64; a Readout computes in fp32 for any type."""
    logits = logits.double()
    if readout.window is not None:
        return resize(readout.window.merge(logits)[None], readout.size)[0]
    visible = readout.visible or logits.shape[-2:]
    return resize(logits[:1, :, : visible[0], : visible[1]].sigmoid(), readout.size)[0]


def update(readout: Readout, logits: Tensor, step: int) -> LabelMap:
    target = LabelMap(readout.size, DEVICE)
    read = reader(readout, target, "triton")
    for start in range(0, logits.shape[1], step):
        read(slice(start, start + step), logits[:, start : start + step])
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("readout", READOUTS, ids=str)
def test_matches_the_torch_readout(readout: Readout, dtype: torch.dtype) -> None:
    logits = make_logits(readout, dtype=dtype)
    truth = exact(readout, logits)
    target = update(readout, logits, 3)
    assert_no_worse_than_eager(target.scores, readout(logits).amax(dim=0), truth.amax(dim=0))
    first, second = truth.topk(2, dim=0).values
    clear = first - second > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(target.labels[clear], truth.argmax(dim=0).int()[clear])


def test_upstreams_window_and_classes_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    readout = Readout((33, 47), SlidingWindow(384, 0.333, (640, 640)))
    logits = make_logits(readout, classes=3)
    monkeypatch.setattr(label_map, "SCRATCH_BYTES", 2 * 4 * 640 * 640)
    target = update(readout, logits, 3)
    truth = exact(readout, logits)
    assert_no_worse_than_eager(target.scores, readout(logits).amax(dim=0), truth.amax(dim=0))
    assert (target.labels == truth.argmax(dim=0)).float().mean() > 0.999


@pytest.mark.parametrize("readout", [READOUTS[0], READOUTS[4]], ids=str)
def test_ties_go_to_the_first_class_and_nan_beats_all(readout: Readout) -> None:
    logits = make_logits(readout, 1).expand(-1, 5, -1, -1).clone()
    logits[:, 3:, :2, :2] = math.nan
    target = update(readout, logits, 2)
    assert target.scores.isnan().any()
    assert torch.equal(target.labels, torch.where(target.scores.isnan(), 3, 0).int())


@pytest.mark.parametrize("readout", [READOUTS[2], READOUTS[4]], ids=str)
def test_strided_logits_give_the_same_bits_every_time(readout: Readout) -> None:
    logits = make_logits(readout)
    expected = update(readout, logits, 7)
    apart = torch.full((len(logits) + 1, 11, 24, 24), torch.nan, device=DEVICE)[1:, 2:9]
    transposed = logits.mT.contiguous().mT
    for view in (apart.copy_(logits), transposed, logits.clone()):
        found = update(readout, view, 7)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.labels, expected.labels)


@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize("readout", [READOUTS[0], READOUTS[4]], ids=str)
def test_offsets_beyond_two_billion(readout: Readout) -> None:
    """The memory between crops and classes is never touched."""
    logits = make_logits(readout, 3, torch.float16)
    storage = torch.empty(len(logits) * 2**31, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided(logits.shape, (2**31 - 2**10, 2**30 - 2**10, 24, 1)).copy_(logits)
    found, expected = update(readout, far, 3), update(readout, logits, 3)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


def test_bad_arguments() -> None:
    readout, logits = READOUTS[3], make_logits(READOUTS[3])

    def refused(match: str, readout: Readout, logits: Tensor) -> None:
        with pytest.raises(ValueError, match=match):
            update(readout, logits, 7)

    refused(r"logits: has shape \[12, 7, 24, 24\]; expected \[13, t, h, w\]", readout, logits[1:])
    refused("all above 0", readout, logits[:, :, :0])
    refused(r"visible: \(0, 3\) are not rows", Readout((5, 5), visible=(0, 3)), logits[:1])
    refused(r"logits: dtype torch.int64", readout, logits.long())
    scores, labels = torch.zeros(5, 5), torch.zeros(5, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"scores: is \[5, 5\] on .*; expected \[5, 4\], as labels"):
        label_map.update_label_map(logits[:1], scores.to(DEVICE), labels.to(DEVICE), 0, (), (24, 24))
    for size in ((2**16, 2**15), (2, 2**26)):  # of which no pixel is in memory
        pixels = torch.zeros(1, device=DEVICE).expand(size)
        with pytest.raises(ValueError, match=r"pixels; expected less than 2\*\*31"):
            label_map.update_label_map(logits[:1], pixels, pixels, 0, (), (24, 24))
