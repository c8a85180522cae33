"""Segmentation of many pictures; decoding and writing run in threads, in parallel with the model."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from catseg_fast.ahead import Room
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.resume import finished
from catseg_fast.config import MAX_PIXELS
from catseg_fast.engine.class_parallel import RankError
from catseg_fast.identity import content_digest
from catseg_fast.inference.images import image_size, load_bytes
from catseg_fast.output.formats import FORMATS
from catseg_fast.output.overlay import compact_labels
from catseg_fast.output.ownership import PNG_SUFFIXES
from catseg_fast.output.results import save_segmentation, summarise

if TYPE_CHECKING:
    from torch import Tensor

    from catseg_fast.cli.labelling import Labelling
    from catseg_fast.inference.segmentation import Segmentation
    from catseg_fast.model import CATSeg

# Pixels of all pictures in memory together: 11 bytes each in the model, up to 15 while results are written.
ROOM = 100_000_000

Classes = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """Result of the picture at `index`.

    Attributes:
        summary: the classes that occur, by `catseg_fast.output.results.summarise`; None if it failed.
        seconds: its share of the model's time; None if its results were up to date.
        error: the error, if it failed.
        overlay: what the name of its overlay ends in, after the stem.
    """

    index: int
    picture: Picture
    summary: Classes | None = None
    seconds: float | None = None
    error: Exception | None = None
    overlay: str = "overlay.png"


@dataclass(frozen=True)
class Decoded:
    """A picture's pixels, uint8 `[3, H, W]`, and the digest of its file.

    Pixels of a picture that fills the room are None: they are read when its turn comes.
    """

    image: Tensor | None
    digest: str | None


@dataclass
class _Job:
    """A picture on its way, and the pixels that it takes of the room."""

    index: int
    picture: Picture
    pixels: int


class Batch:
    """Segments pictures and saves the results.

    Args:
        model: has its classes; or it with what is asked for.
        about: further entries of the JSON files; results with its "fingerprint" are up to date.
        alpha: share of the colours in the overlay.
        formats: formats to write as well, of `catseg_fast.output.formats.FORMATS`.
        size: pictures in one call of the model.
        overwrite: also segment pictures whose results are up to date.
        threads: number of threads for decoding, and of those for writing.
        present: as in `save_segmentation`.
        max_pixels: most pixels of a picture, looked up before it is decoded; None for no limit.
        room: pixels of all pictures in memory together; one with more of them comes when there is no other.
    """

    def __init__(
        self,
        model: CATSeg | Labelling,
        about: Mapping[str, Any],
        *,
        alpha: float = 0.55,
        formats: Sequence[str] = (),
        size: int = 1,
        overwrite: bool = False,
        threads: int | None = None,
        present: float | None = None,
        max_pixels: int | None = MAX_PIXELS,
        room: int = ROOM,
    ) -> None:
        self.model, self.about, self.alpha, self.size, self.overwrite = model, about, alpha, size, overwrite
        self.formats = formats
        self.suffixes = (*PNG_SUFFIXES, *(FORMATS[name].suffix for name in formats))
        self.present = present
        self.threads = threads or min(4, os.cpu_count() or 1)
        self.max_pixels, self.room = max_pixels, Room(room)

    def run(self, pictures: Sequence[Picture]) -> Iterator[Outcome]:
        """Yield each picture's outcome as soon as its results are written, or it has failed.

        At most `size` and twice `threads` pictures are in memory at a time, and fewer if they are large.
        After an interruption, finished pictures are still written.

        Raises:
            RankError: if the classes are split over ranks, and one has ended or failed.
        """
        decoders = ThreadPoolExecutor(self.threads, "decode")
        writers = ThreadPoolExecutor(self.threads, "write")
        todo = (_Job(index, picture, self._pixels(picture)) for index, picture in enumerate(pictures))
        following = next(todo, None)
        decoding: deque[tuple[_Job, Future[Decoded | Classes]]] = deque()
        waiting: list[tuple[_Job, Decoded]] = []
        writing: deque[tuple[_Job, float, Future[Classes]]] = deque()

        def written() -> Outcome:
            """Wait for the picture that has been written for the longest time."""
            job, seconds, future = writing.popleft()
            try:
                return Outcome(job.index, job.picture, future.result(), seconds)
            except Exception as error:
                return Outcome(job.index, job.picture, error=error)
            finally:
                self.room.leave(job.pixels)

        def segment() -> Iterator[Outcome]:
            """Run the model on what waits; wait for the writers if they have fallen behind."""
            start = time.perf_counter()
            answers = self._segment([decoded.image for _, decoded in waiting if decoded.image is not None])
            seconds = (time.perf_counter() - start) / len(waiting)
            for (job, decoded), answer in zip(waiting, answers, strict=True):
                if isinstance(answer, Exception):
                    self.room.leave(job.pixels)
                    yield Outcome(job.index, job.picture, error=answer)
                else:
                    future = writers.submit(self._write, job.picture, decoded, answer)
                    writing.append((job, seconds, future))
            waiting.clear()
            while len(writing) > self.threads:
                yield written()

        with decoders, writers:
            while following or decoding or waiting or writing:
                while following and len(decoding) <= self.threads and self.room.take(following.pixels):
                    decoding.append((following, decoders.submit(self._decode, following)))
                    following = next(todo, None)
                if decoding and len(waiting) < self.size:
                    job, future = decoding.popleft()
                    outcome = self._decoded(job, future, waiting)
                    if outcome is not None:
                        self.room.leave(job.pixels)
                        yield outcome
                elif waiting:
                    yield from segment()
                else:
                    yield written()

    def _pixels(self, picture: Picture) -> int:
        """Return the pixels of a picture by its header; 0 for what will be refused."""
        try:
            height, width = image_size(picture.path, max_pixels=self.max_pixels)
        except (OSError, ValueError):
            return 0
        return height * width

    def _decode(self, job: _Job) -> Decoded | Classes:
        """Return a picture's pixels, or its classes if its results are up to date."""
        path = job.picture.path
        if not self.overwrite:
            content = finished(job.picture, self.about["fingerprint"], self.suffixes)
            if content:
                return occurring(content["classes"])
        # The digest comes first: if the file changes in between, the results count as another content's.
        digest = content_digest(path) if path.is_file() else None
        if job.pixels > self.room.size:
            return Decoded(None, digest)
        return Decoded(load_bytes(path, max_pixels=self.max_pixels), digest)

    def _decoded(
        self, job: _Job, future: Future[Decoded | Classes], waiting: list[tuple[_Job, Decoded]]
    ) -> Outcome | None:
        """Put a picture among those that wait for the model; or return what became of it already."""
        try:
            found = future.result()
            if isinstance(found, list):
                return Outcome(job.index, job.picture, found)
            if found.image is None:
                return self._large(job, found)
        except RankError:
            raise
        except Exception as error:
            return Outcome(job.index, job.picture, error=error)
        waiting.append((job, found))
        return None

    def _large(self, job: _Job, decoded: Decoded) -> Outcome:
        """Segment and write a picture that fills the room.

        Its pixels, labels and scores are never in memory all together: the pixels are read twice, and the
        scores are gone before labels are drawn.
        """
        picture, start = job.picture, time.perf_counter()

        def read() -> Tensor:
            return load_bytes(picture.path, max_pixels=self.max_pixels)

        answer = self.model.segment(picture.path)
        seconds = time.perf_counter() - start
        summary, labels = summarise(answer), compact_labels(answer.labels, len(answer.classes))
        answer = replace(answer, labels=labels, scores=torch.empty(0))
        about = {"image": str(picture.path), **self.about}
        classes = save_segmentation(
            picture.folder, picture.stem, read, answer, about, self.alpha, picture=picture.path,
            digest=decoded.digest, formats=self.formats, present=self.present, summary=summary,
        )  # fmt: skip
        return Outcome(job.index, picture, occurring(classes), seconds)

    def _segment(self, images: list[Tensor]) -> Sequence[Segmentation | Exception]:
        if len(images) > 1:
            try:
                return self.model.segment_batch(images)
            except RankError:
                raise
            except Exception:
                pass  # one by one, they may succeed, or the one that fails is found
        answers: list[Segmentation | Exception] = []
        for image in images:
            try:
                answers.append(self.model.segment(image))
            except RankError:
                raise
            except Exception as error:
                answers.append(error)
        return answers

    def _write(self, picture: Picture, decoded: Decoded, answer: Segmentation) -> Classes:
        assert decoded.image is not None
        about = {"image": str(picture.path), **self.about}
        classes = save_segmentation(
            picture.folder, picture.stem, decoded.image, answer, about, self.alpha,
            picture=picture.path, digest=decoded.digest, formats=self.formats, present=self.present,
        )  # fmt: skip
        return occurring(classes)


def occurring(classes: Classes) -> Classes:
    """Return the classes of a summary that have pixels."""
    return [entry for entry in classes if entry["share"]]
