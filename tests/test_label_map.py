"""Label maps, chunk by chunk, against the argmax over all classes at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast.inference.readout import (
    READOUT_BYTES,
    LabelMap,
    Probabilities,
    Readout,
    TopClasses,
    reader,
)
from catseg_fast.reference.inference import SlidingWindow, resize
from support.live_bytes import LiveBytes

SIZE = (13, 17)
CPU = torch.device("cpu")


def probabilities(classes: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(classes, *SIZE, generator=generator).mul(8).round().div(8)  # many ties


@pytest.mark.parametrize("step", [1, 2, 5, 11])
def test_labels_and_scores_are_the_maximums(step: int) -> None:
    maps = probabilities()
    target, top = LabelMap(SIZE, CPU), TopClasses(4, SIZE, CPU)
    for start in range(0, len(maps), step):
        target.update(start, maps[start : start + step])
        top.update(start, maps[start : start + step])
    assert torch.equal(target.labels, maps.argmax(dim=0).int())
    assert torch.equal(target.scores, maps.amax(dim=0))
    scores, labels = maps.sort(dim=0, descending=True, stable=True)
    assert torch.equal(top.scores, scores[:4])
    assert torch.equal(top.labels, labels[:4].int())


@pytest.mark.parametrize("owners", [None, [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5]])
def test_rows_that_come_again_are_not_taken_in_twice(
    owners: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out between two strips of an update, which comes again in other chunks."""
    maps, take = probabilities(), TopClasses._take
    expected = TopClasses(3, SIZE, CPU, owners)
    expected.update(0, maps)
    monkeypatch.setattr("catseg_fast.inference.readout.READOUT_BYTES", 1)
    for failing in range(1, 2 * SIZE[0], 3):
        calls = iter(range(10**6))

        def failing_take(self: TopClasses, *arguments: Any, calls: Any = calls, turn: int = failing) -> int:
            if next(calls) == turn:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return take(self, *arguments)

        monkeypatch.setattr(TopClasses, "_take", failing_take)
        target = TopClasses(3, SIZE, CPU, owners)
        start = 0 if failing < SIZE[0] else 6
        if start:
            target.update(0, maps[:6])
        with pytest.raises(torch.OutOfMemoryError):
            target.update(start, maps[start : start + 6])
        for first in range(start, len(maps), 2):
            target.update(first, maps[first : first + 2])
        assert torch.equal(target.scores, expected.scores)
        assert torch.equal(target.labels, expected.labels)


@pytest.mark.parametrize("size", [(1000, 1500), (4000, 6000)])
def test_the_best_classes_take_a_bounded_working_memory(size: tuple[int, int]) -> None:
    readout = Readout(size)
    logits = torch.randn(1, 4, 6, 6)
    target = TopClasses(3, size, CPU)
    consume = reader(readout, target)
    with LiveBytes() as live:
        consume(slice(0, 4), logits)
    assert live.peak <= readout.class_bytes + 2 * READOUT_BYTES


def test_ties_go_to_the_first_class_and_nan_beats_all() -> None:
    maps = torch.full((5, *SIZE), 0.25)
    maps[3, 0, 0] = maps[4, 0, 0] = math.nan
    target = LabelMap(SIZE, CPU)
    for index in range(5):
        target.update(index, maps[index : index + 1])
    assert target.labels[0, 0] == 3
    assert target.scores[0, 0].isnan()
    assert not target.labels.flatten()[1:].any()
    assert torch.equal(target.labels, maps.argmax(dim=0).int())


@pytest.mark.parametrize(
    "window", [None, SlidingWindow(8, 0.25, (20, 26)), SlidingWindow(384, 0.333, (640, 640))]
)
def test_readout_of_chunks_is_that_of_all_classes(window: SlidingWindow | None) -> None:
    crops = 1 if window is None else len(window.corners()) + 1
    logits = torch.randn(crops, 9, 6, 6, generator=torch.Generator().manual_seed(1))
    readout = Readout(SIZE, window)
    if window is None:
        expected = resize(logits.sigmoid(), SIZE)[0]
    else:
        expected = resize(window.merge(logits)[None], SIZE)[0]
    every, best = Probabilities(9, SIZE, CPU), LabelMap(SIZE, CPU)
    for target in (every, best):
        consume = reader(readout, target)
        for classes in (slice(0, 4), slice(4, 9)):
            consume(classes, logits[:, classes])
    torch.testing.assert_close(every.maps, expected, rtol=0, atol=1e-6)
    assert torch.equal(best.labels, every.maps.argmax(dim=0).int())
    assert torch.equal(best.scores, every.maps.amax(dim=0))


def test_a_chunk_that_comes_again_is_not_taken_in_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out between two of its classes."""
    monkeypatch.setattr("catseg_fast.inference.readout.READOUT_BYTES", 1)
    logits = torch.randn(1, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    top = TopClasses(5, SIZE, CPU)
    update, calls = top.update, iter(range(100))

    def failing(first: int, probabilities: Tensor, rows: slice) -> None:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        update(first, probabilities, rows)

    monkeypatch.setattr(top, "update", failing)
    consume = reader(Readout(SIZE), top)
    with pytest.raises(torch.OutOfMemoryError):
        consume(slice(0, 4), logits[:, :4])
    for classes in (slice(0, 2), slice(2, 4), slice(4, 5)):
        consume(classes, logits[:, classes])
    expected = Readout(SIZE)(logits).argsort(dim=0, descending=True, stable=True)
    assert torch.equal(top.labels, expected.int())


@pytest.mark.parametrize("visible", [None, (5, 4)])
@pytest.mark.parametrize("window", [None, SlidingWindow(8, 0.25, (20, 26))])
def test_strips_add_up_to_the_map(
    window: SlidingWindow | None, visible: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any number of rows, for every target, and with all classes in one chunk or in several."""
    size = (61, 47)
    logits = torch.randn(1 if window is None else window.count, 7, 6, 6)
    readout = Readout(size, window, visible if window is None else None)
    whole = readout(logits)
    for bytes_, strips in ((1, 61), (32 * 47 * 10, 7), (32 * 47 * 20, 4)):
        monkeypatch.setattr("catseg_fast.inference.readout.READOUT_BYTES", bytes_)
        assert len(readout.rows) == strips
        targets = Probabilities(7, size, CPU), LabelMap(size, CPU), TopClasses(3, size, CPU)
        for target in targets:
            consume = reader(readout, target)
            for classes in (slice(0, 2), slice(2, 7)):
                consume(classes, logits[:, classes])
        maps, best, top = targets
        torch.testing.assert_close(maps.maps, whole, rtol=0, atol=1e-6)
        assert torch.equal(best.labels, maps.maps.argmax(dim=0).int())
        assert torch.equal(best.scores, maps.maps.amax(dim=0))
        expected = whole.sort(dim=0, descending=True).values[:3]
        torch.testing.assert_close(top.scores, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(whole.gather(0, top.labels.long()), expected, rtol=0, atol=1e-6)


def test_strips_that_come_again_are_not_taken_in_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out between two strips of a class: the ones before it are not counted again."""
    monkeypatch.setattr("catseg_fast.inference.readout.READOUT_BYTES", 1)
    logits = torch.randn(1, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    maps, taken = Probabilities(5, SIZE, CPU), []
    update = maps.update

    def failing(first: int, probabilities: Tensor, rows: slice) -> None:
        if len(taken) == 2 * SIZE[0] + 3:  # the fourth row of the third class
            taken.append(None)
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken.append((first, rows.start))
        update(first, probabilities, rows)

    monkeypatch.setattr(maps, "update", failing)
    consume = reader(Readout(SIZE), maps)
    with pytest.raises(torch.OutOfMemoryError):
        consume(slice(0, 4), logits[:, :4])
    for classes in (slice(0, 2), slice(2, 4), slice(4, 5)):
        consume(classes, logits[:, classes])
    taken.remove(None)
    assert len(taken) == len(set(taken)) == 5 * SIZE[0]
    torch.testing.assert_close(maps.maps, Readout(SIZE)(logits), rtol=0, atol=1e-6)


def test_a_large_picture_takes_a_bounded_working_memory() -> None:
    """At 24 megapixels: besides the result, at most `class_bytes`, which does not grow with the pixels."""
    size = (4000, 6000)
    readout = Readout(size, SlidingWindow(8, 0.25, (20, 26)))
    assert readout.window is not None
    logits = torch.randn(readout.window.count, 3, 6, 6)
    target = LabelMap(size, CPU)
    consume = reader(readout, target)
    with LiveBytes() as live:
        consume(slice(0, 3), logits)
    assert readout.class_bytes < READOUT_BYTES + 2**20
    assert live.peak <= readout.class_bytes
    assert len(readout.rows) > 10


def test_small_images_show_a_part_of_the_map_as_upstream_does() -> None:
    logits = torch.randn(1, 2, 96, 96, generator=torch.Generator().manual_seed(2))
    cut = Readout((50, 60), visible=(50, 60))(logits)
    assert torch.equal(cut, logits[0].sigmoid()[:, :50, :60])
