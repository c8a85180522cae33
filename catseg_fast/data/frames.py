"""Frames of a video file, or of a folder of pictures, one after the other: nothing else is in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from catseg_fast.errors import InputError
from catseg_fast.files import open_regular
from catseg_fast.identity import content_digest, settings_digest
from catseg_fast.imports import require_pyav
from catseg_fast.inference.images import load_image
from catseg_fast.inference.suffixes import picture_suffixes
from catseg_fast.numeric import whole
from catseg_fast.output.ownership import is_result


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        index: its number among all frames of the video, from 0.
        time: when it is shown, in seconds.
        image: uint8 `[3, H, W]`.
        name: what errors call it.
    """

    index: int
    time: Fraction
    image: Tensor
    name: str


class Frames(Protocol):
    """The frames of a video.

    Attributes:
        rate: frames that are shown per second.
        count: frames that iterating yields; None if the file does not tell.
    """

    rate: Fraction
    count: int | None

    def __iter__(self) -> Iterator[Frame]: ...


def open_frames(path: Path, every: int = 1, rate: Fraction = Fraction(25)) -> Frames:
    """The frames of a video file, or of a folder of pictures in the order of the numbers in their names.

    Args:
        path: the file or folder.
        every: yield only each Nth frame, from the first one on.
        rate: pictures of a folder that are shown per second.

    Raises:
        InputError: if it cannot be read, has no video stream or, of a folder, holds no pictures.
    """
    whole(every, "every")
    return _FolderFrames(path, every, rate) if path.is_dir() else _VideoFrames(path, every)


def natural_order(path: Path) -> list[tuple[bool, int, str]]:
    """A sort key by which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder that are frames: results of this package are not."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in picture_suffixes())
    files = (path for path in found if path.is_file() and path.name[0] != "." and not is_result(path))
    return sorted(files, key=natural_order)


def frames_digest(path: Path) -> str:
    """The digest of a video's content; of a folder, of the names and contents of its frames."""
    if not path.is_dir():
        return content_digest(path)
    return settings_digest({file.name: content_digest(file) for file in frame_files(path)})


class _FolderFrames:
    def __init__(self, folder: Path, every: int, rate: Fraction) -> None:
        self.files, self.every, self.rate = frame_files(folder), every, rate / every
        if not self.files:
            raise InputError(f"{folder} holds no pictures")
        self.count: int | None = len(self.files[::every])

    def __iter__(self) -> Iterator[Frame]:
        for index in range(0, len(self.files), self.every):
            path = self.files[index]
            image = load_image(path, "frame").round().byte()
            yield Frame(index, index / (self.rate * self.every), image, str(path))


class _VideoFrames:
    def __init__(self, path: Path, every: int) -> None:
        require_pyav()
        self.path, self.every = path, every
        with self._opened() as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            self.total: int | None = stream.frames or None
            if self.total is None and container.duration:
                self.total = round(Fraction(container.duration, 10**6) * rate)
        self.rate = rate / every
        self.count = None if self.total is None else -(-self.total // every)

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames.

        Raises:
            InputError: after the frames that can be decoded, if the file has been cut short or is damaged.
        """
        import av

        index, start, last = 0, Fraction(0), Fraction(-1)
        with self._opened() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            try:
                for frame in container.decode(stream):
                    time = last + 1 / (self.rate * self.every) if index else Fraction(0)
                    if frame.pts is not None and frame.time_base is not None:
                        shown = frame.pts * Fraction(frame.time_base)
                        start = start if index else shown
                        time = shown - start if shown - start > last else time
                    if index % self.every == 0:
                        yield Frame(index, time, _upright(frame), f"frame {index} of {self.path}")
                    index, last = index + 1, time
            except av.FFmpegError as error:
                raise self._cut_short(index, error.strerror) from error
        # What an index promises may be off by a frame or two, and a duration by the audio's.
        tolerance = 2 if self.total is None else max(2, self.total // 100)
        if index == 0 or (self.total is not None and index < self.total - tolerance):
            raise self._cut_short(index, "the file ends")

    def _cut_short(self, index: int, reason: str | None) -> InputError:
        of = "" if self.total is None else f" of {self.total}"
        return InputError(
            f"{self.path}: cut short or damaged after {index}{of} frames ({reason}); these are done"
        )

    def _opened(self) -> Any:
        import av

        try:
            open_regular(self.path).close()  # not a FIFO, nor a folder
            container = av.open(str(self.path))
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file: {str(self.path)!r}") from None
        except (av.FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.path}: cannot read the video ({reason}); is the file whole?") from error
        if not container.streams.video:
            container.close()
            raise InputError(f"{self.path}: there is no video stream in it")
        return container


def _upright(frame: Any) -> Tensor:
    """The pixels of a PyAV frame, uint8 `[3, H, W]`, turned as the file says that they are to be shown."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, turns).transpose(2, 0, 1)))
