"""Segmentation of videos and folders of frames; decoding and writing run in parallel with the model."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from catseg_fast.ahead import ahead
from catseg_fast.cli.batch import Outcome, occurring
from catseg_fast.cli.clip_results import ClipResults
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.resume import finished
from catseg_fast.data.frames import Frame, Frames, frames_digest, open_frames
from catseg_fast.engine.class_parallel import RankError
from catseg_fast.identity import settings_digest
from catseg_fast.output.colours import palette
from catseg_fast.output.overlay import overlay
from catseg_fast.output.ownership import VIDEO_SUFFIXES
from catseg_fast.output.totals import Totals

if TYPE_CHECKING:
    from catseg_fast.cli.labelling import Labelling
    from catseg_fast.inference.segmentation import Segmentation

_Done: TypeAlias = tuple[NDArray[np.uint8], Totals]  # a painted frame [H, W, 3], and its sums


@dataclass(frozen=True)
class Clips:
    """Segments videos and saves the results.

    `STEM.labels/` gets a 16-bit PNG per frame as soon as the frame is done, `STEM.overlay.mp4` the frames
    with the classes' colours, which are the same in all of them, and `STEM.json` a summary. After an
    interruption, the next run uses the label maps that are there, and makes the overlay again.

    Args:
        model: has its classes, with what is asked for.
        classes: the class names.
        about: as in `catseg_fast.cli.batch.Batch`.
        alpha: share of the colours in the overlay.
        every: segment only each Nth frame.
        rate: frames per second of folders.
        overwrite: also segment videos whose results are up to date, and frames that are done.
        threads: number of threads for painting and writing.
    """

    model: Labelling
    classes: tuple[str, ...]
    about: Mapping[str, Any]
    alpha: float = 0.55
    every: int = 1
    rate: Fraction = Fraction(25)
    overwrite: bool = False
    threads: int = min(4, os.cpu_count() or 1)

    def run(self, index: int, clip: Picture, advance: Callable[[int, int], object]) -> Outcome:
        """Segment a video; after an error, and when it is interrupted, the frames done so far are kept.

        Args:
            index: the outcome's.
            clip: the video file, or folder of frames.
            advance: called with the frames done and the number of all frames, 0 if that is unknown.
        """
        fingerprint = settings_digest(
            {"frames": self.about["fingerprint"], "every": self.every, "rate": str(self.rate)}
        )
        try:
            content = None
            if not self.overwrite:
                content = finished(clip, fingerprint, VIDEO_SUFFIXES, frames_digest)
            if content:
                return Outcome(index, clip, occurring(content["classes"]), overlay="overlay.mp4")
            start = time.perf_counter()
            digest = frames_digest(clip.path)  # first: if the video changes meanwhile, it is another one
            frames = open_frames(clip.path, self.every, self.rate)
            about = {"image": str(clip.path), **self.about, "fingerprint": fingerprint, "every": self.every}
            asked = (self.classes, self.model, self.overwrite)
            with ClipResults(clip, frames.rate, about, digest, *asked) as results:
                self._segment(frames, results, advance)
                results.complete = True
        except RankError:
            raise
        except Exception as error:
            return Outcome(index, clip, error=error, overlay="overlay.mp4")
        summary = occurring(results.totals.summary(self.model.present or 0))
        return Outcome(index, clip, summary, time.perf_counter() - start, overlay="overlay.mp4")

    def _segment(self, frames: Frames, results: ClipResults, advance: Callable[[int, int], object]) -> None:
        """Run all frames through the model, one at a time, so that recordings are replayed."""
        done, total = 0, frames.count or 0
        advance(done, total)
        colours = palette(self.classes)
        writing: deque[tuple[Frame, Future[_Done]]] = deque()

        def paint(frame: Frame, labels: Tensor) -> NDArray[np.uint8]:
            painted = overlay(frame.image, labels, self.classes, self.alpha, legend=False, colours=colours)
            return np.asarray(painted)

        def finish(frame: Frame, answer: Segmentation) -> _Done:
            sums = results.write(frame, answer.labels, answer.scores)
            return paint(frame, answer.labels), sums

        def repeat(frame: Frame, labels: Tensor, sums: Totals) -> _Done:
            return paint(frame, labels), sums

        def write_one() -> None:
            nonlocal done
            frame, job = writing.popleft()
            results.add(frame, *job.result())
            done += 1
            advance(done, max(done, total) if total else 0)

        with (
            ThreadPoolExecutor(1, "decode") as decoder,
            ThreadPoolExecutor(self.threads, "paint") as painters,
        ):
            try:
                for frame in _decoded(decoder, frames):
                    results.check(frame)
                    if kept := results.kept(frame):
                        job = painters.submit(repeat, frame, *kept)
                    else:
                        job = painters.submit(finish, frame, self.model.segment(frame.image))
                    writing.append((frame, job))
                    while len(writing) > self.threads:
                        write_one()
            finally:
                while writing:
                    write_one()


def _decoded(pool: ThreadPoolExecutor, frames: Frames) -> Iterator[Frame]:
    """Yield the frames; a few are decoded ahead by a pool of one thread."""
    source = iter(frames)
    for job in ahead(pool, lambda _: next(source, None), itertools.count(), 3):
        frame = job.result()
        if frame is None:
            return
        yield frame
