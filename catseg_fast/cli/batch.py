"""Segmentation of many pictures; decoding and writing run in threads, in parallel with the model."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from catseg_fast.ahead import ahead
from catseg_fast.cli.inputs import Picture
from catseg_fast.cli.resume import finished
from catseg_fast.engine.class_parallel import RankError
from catseg_fast.identity import content_digest
from catseg_fast.inference.images import load_image
from catseg_fast.output.formats import FORMATS
from catseg_fast.output.ownership import PNG_SUFFIXES
from catseg_fast.output.results import save_segmentation

if TYPE_CHECKING:
    from torch import Tensor

    from catseg_fast.cli.labelling import Labelling
    from catseg_fast.inference.segmentation import Segmentation
    from catseg_fast.model import CATSeg


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
    summary: list[dict[str, Any]] | None = None
    seconds: float | None = None
    error: Exception | None = None
    overlay: str = "overlay.png"


@dataclass(frozen=True)
class Decoded:
    """A picture's pixels, uint8 `[3, H, W]`, and the digest of its file."""

    image: Tensor
    digest: str | None


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
    ) -> None:
        self.model, self.about, self.alpha, self.size, self.overwrite = model, about, alpha, size, overwrite
        self.formats = formats
        self.suffixes = (*PNG_SUFFIXES, *(FORMATS[name].suffix for name in formats))
        self.present = present
        self.threads = threads or min(4, os.cpu_count() or 1)

    def run(self, pictures: Sequence[Picture]) -> Iterator[Outcome]:
        """Yield each picture's outcome as soon as its results are written, or it has failed.

        At most `size` and twice `threads` pictures are in memory at a time. After an interruption, finished
        pictures are still written.

        Raises:
            RankError: if the classes are split over ranks, and one has ended or failed.
        """
        decoders = ThreadPoolExecutor(self.threads, "decode")
        writers = ThreadPoolExecutor(self.threads, "write")
        writing: deque[tuple[int, Picture, float, Future[list[dict[str, Any]]]]] = deque()
        waiting: list[tuple[int, Picture, Decoded]] = []
        with decoders, writers:

            def segment() -> Iterator[Outcome]:
                """Run the model on the waiting pictures; wait for the writers if they are behind."""
                start = time.perf_counter()
                answers = self._segment([decoded.image for _, _, decoded in waiting])
                seconds = (time.perf_counter() - start) / len(waiting)
                for (index, picture, decoded), answer in zip(waiting, answers, strict=True):
                    if isinstance(answer, Exception):
                        yield Outcome(index, picture, error=answer)
                    else:
                        job = writers.submit(self._write, picture, decoded, answer)
                        writing.append((index, picture, seconds, job))
                waiting.clear()
                while len(writing) > self.threads:
                    yield _written(*writing.popleft())

            jobs = ahead(decoders, self._decode, pictures, self.threads)
            for index, (picture, job) in enumerate(zip(pictures, jobs, strict=True)):
                try:
                    found = job.result()
                except Exception as error:
                    yield Outcome(index, picture, error=error)
                    continue
                if isinstance(found, list):
                    yield Outcome(index, picture, found)
                    continue
                waiting.append((index, picture, found))
                if len(waiting) >= self.size:
                    yield from segment()
            if waiting:
                yield from segment()
            while writing:
                yield _written(*writing.popleft())

    def _decode(self, picture: Picture) -> Decoded | list[dict[str, Any]]:
        """Return a picture's pixels, or its classes if its results are up to date."""
        if not self.overwrite and (content := finished(picture, self.about["fingerprint"], self.suffixes)):
            return occurring(content["classes"])
        # The digest comes first: if the file changes in between, the results count as another content's.
        digest = content_digest(picture.path) if picture.path.is_file() else None
        return Decoded(load_image(picture.path).round().byte(), digest)  # files hold 8 bits

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

    def _write(self, picture: Picture, decoded: Decoded, answer: Segmentation) -> list[dict[str, Any]]:
        about = {"image": str(picture.path), **self.about}
        classes = save_segmentation(
            picture.folder, picture.stem, decoded.image, answer, about, self.alpha,
            picture=picture.path, digest=decoded.digest, formats=self.formats, present=self.present,
        )  # fmt: skip
        return occurring(classes)


def occurring(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the classes of a summary that have pixels."""
    return [entry for entry in classes if entry["share"]]


def _written(index: int, picture: Picture, seconds: float, job: Future[list[dict[str, Any]]]) -> Outcome:
    try:
        return Outcome(index, picture, job.result(), seconds)
    except Exception as error:
        return Outcome(index, picture, error=error)
