"""Segmentation of videos and folders of frames; decoding and writing run in parallel with the model."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catseg_fast.ahead import ahead
from catseg_fast.cli.batch import Outcome, occurring
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.resume import finished
from catseg_fast.data.frames import Frame, Frames, open_frames
from catseg_fast.engine.class_parallel import RankError
from catseg_fast.errors import InputError
from catseg_fast.files import temporary_folder
from catseg_fast.identity import place_digest, place_of, png_mark, result_digest, settings_digest
from catseg_fast.output.colours import palette
from catseg_fast.output.overlay import label_png, overlay
from catseg_fast.output.ownership import VIDEO_SUFFIXES
from catseg_fast.output.results import require_ours, write_result
from catseg_fast.output.totals import Totals
from catseg_fast.output.video import VideoWriter

if TYPE_CHECKING:
    from catseg_fast.cli.labelling import Labelling
    from catseg_fast.inference.segmentation import Segmentation


@dataclass(frozen=True)
class Clips:
    """Segments videos and saves the results.

    `STEM.labels/` gets a 16-bit PNG per frame as soon as the frame is done, `STEM.overlay.mp4` the frames
    with the classes' colours, which are the same in all of them, and `STEM.json` a summary.

    Args:
        model: has its classes, with what is asked for.
        classes: the class names.
        about: as in `catseg_fast.cli.batch.Batch`.
        alpha: share of the colours in the overlay.
        every: segment only each Nth frame.
        rate: frames per second of folders.
        overwrite: also segment videos whose results are up to date.
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
            if not self.overwrite and (content := finished(clip, fingerprint, VIDEO_SUFFIXES)):
                return Outcome(index, clip, occurring(content["classes"]), overlay="overlay.mp4")
            start = time.perf_counter()
            digest = result_digest(clip.path)  # first: if the video changes meanwhile, it is another one
            frames = open_frames(clip.path, self.every, self.rate)
            about = {"image": str(clip.path), **self.about, "fingerprint": fingerprint, "every": self.every}
            with _Results(clip, frames.rate, about, digest, self.classes, self.model) as results:
                self._segment(frames, results, advance)
                results.complete = True
        except RankError:
            raise
        except Exception as error:
            return Outcome(index, clip, error=error, overlay="overlay.mp4")
        summary = occurring(results.totals.summary(self.model.present or 0))
        return Outcome(index, clip, summary, time.perf_counter() - start, overlay="overlay.mp4")

    def _segment(self, frames: Frames, results: _Results, advance: Callable[[int, int], object]) -> None:
        """Run all frames through the model, one at a time, so that recordings are replayed."""
        done, total = 0, frames.count or 0
        advance(done, total)
        writing: deque[tuple[Frame, Segmentation, Future[NDArray[np.uint8]]]] = deque()
        with (
            ThreadPoolExecutor(1, "decode") as decoder,
            ThreadPoolExecutor(self.threads, "paint") as painters,
        ):

            def write_one() -> None:
                nonlocal done
                frame, answer, job = writing.popleft()
                results.add(frame, answer, job.result())
                done += 1
                advance(done, max(done, total) if total else 0)

            try:
                for frame in _decoded(decoder, frames):
                    results.check(frame)
                    answer = self.model.segment(frame.image)
                    writing.append((frame, answer, painters.submit(self._paint, results, frame, answer)))
                    while len(writing) > self.threads:
                        write_one()
            finally:
                while writing:
                    write_one()

    def _paint(self, results: _Results, frame: Frame, answer: Segmentation) -> NDArray[np.uint8]:
        """Write a frame's label map, and return its overlay `[H, W, 3]`."""
        results.write_labels(frame, answer)
        painted = overlay(
            frame.image, answer.labels, answer.classes, self.alpha, legend=False, colours=results.colours
        )
        return np.asarray(painted)


def _decoded(pool: ThreadPoolExecutor, frames: Frames) -> Iterator[Frame]:
    """Yield the frames; a few are decoded ahead by a pool of one thread."""
    source = iter(frames)
    for job in ahead(pool, lambda _: next(source, None), itertools.count(), 3):
        frame = job.result()
        if frame is None:
            return
        yield frame


class _Results:
    """The files of a video's results, which are put in place at its end, complete or not.

    Attributes:
        complete: whether all frames are in them.
    """

    def __init__(
        self,
        clip: Picture,
        rate: Fraction,
        about: Mapping[str, Any],
        digest: str,
        classes: tuple[str, ...],
        asked: Labelling,
    ) -> None:
        self.clip, self.rate, self.about, self.digest = clip, rate, about, digest
        self.asked = asked
        self.totals, self.colours = Totals(classes, asked.min_score is not None), palette(classes)
        self.complete, self.mark = False, place_digest(clip.path)
        self.labels, self.size, self.count = clip.folder / f"{clip.stem}.labels", (0, 0), 0
        self.writer: VideoWriter | None = None

    def __enter__(self) -> _Results:
        clip = self.clip
        clip.folder.mkdir(parents=True, exist_ok=True)
        require_ours(clip.folder, clip.stem, clip.path)
        self._folder = temporary_folder(clip.folder)
        self.scratch = self._folder.__enter__()
        clip.result("json").unlink(missing_ok=True)
        if self.labels.exists():
            shutil.rmtree(self.labels)
        self.labels.mkdir()
        return self

    def check(self, frame: Frame) -> None:
        """Check that a frame has the size of the first one, which starts the video."""
        size = (frame.image.shape[1], frame.image.shape[2])
        if self.writer is None:
            self.size = size
            self.writer = VideoWriter(self.scratch / "overlay.mp4", size, self.rate, self.mark)
        elif size != self.size:
            raise InputError(
                f"{frame.name}: expected a frame of {self.size[1]}x{self.size[0]} pixels as the first one, "
                f"got {size[1]}x{size[0]}"
            )

    def write_labels(self, frame: Frame, answer: Segmentation) -> None:
        """Write the label map of a frame; from any thread."""
        name = f"{frame.index:06d}.png"
        label_png(answer.labels).save(self.scratch / name, pnginfo=png_mark(self.mark))
        os.replace(self.scratch / name, self.labels / name)

    def add(self, frame: Frame, answer: Segmentation, painted: NDArray[np.uint8]) -> None:
        """Append a frame, whose label map is written, to the overlay and the sums."""
        assert self.writer is not None
        self.writer.add(painted, frame.time)
        self.totals.add(answer.labels, answer.scores)
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._put_in_place()
        finally:
            self._folder.__exit__(None, None, None)

    def _put_in_place(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if not self.count:
            if not any(self.labels.iterdir()):
                self.labels.rmdir()
            return
        target = self.clip.result("overlay.mp4")
        os.replace(self.scratch / "overlay.mp4", target)
        identity = {
            "path": place_of(self.clip.path),
            "content": self.digest if self.complete else None,  # the next run segments it again
            "files": {path.name: result_digest(path) for path in (target, self.labels)},
        }
        height, width = self.size
        content = {
            **self.about, "identity": identity, "width": width, "height": height, "frames": self.count,
            "rate": float(self.rate), "complete": self.complete, **self.asked.described,
            "classes": self.totals.summary(self.asked.present or 0),
        }  # fmt: skip
        result: Path = self.clip.result("json")
        write_result(self.scratch / result.name, content)
        os.replace(self.scratch / result.name, result)
