"""Files of a video's results: label maps frame by frame, which a later run uses again, then the rest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from catseg_fast.cli.inputs import Picture
from catseg_fast.data.frames import Frame
from catseg_fast.errors import InputError
from catseg_fast.files import exclusive, temporary_folder
from catseg_fast.identity import place_digest, place_of, png_mark, result_digest, settings_digest
from catseg_fast.inference.decoding import opened
from catseg_fast.labels import NONE
from catseg_fast.output.overlay import UNLABELLED_VALUE, label_png
from catseg_fast.output.results import require_ours, write_result
from catseg_fast.output.totals import Totals
from catseg_fast.output.video import VideoWriter

if TYPE_CHECKING:
    from catseg_fast.cli.labelling import Labelling

_SUMS = "catseg-fast frame"  # keyword of the PNG's text chunk


class ClipResults:
    """The files of a video's results; overlay and JSON file are put in place at its end, complete or not.

    A label map is in place as soon as its frame is done. It also holds the frame's sums, and a key of the
    video and the settings: a later run of the same uses it again.

    Args:
        clip: the video.
        rate: frames per second.
        about: entries of the JSON file.
        digest: of the video's content.
        classes: the class names.
        asked: what is asked for.
        fresh: use no label maps of an earlier run.

    Attributes:
        complete: whether all frames are in them.
        totals: the sums of the frames so far.
    """

    def __init__(
        self,
        clip: Picture,
        rate: Fraction,
        about: Mapping[str, Any],
        digest: str,
        classes: tuple[str, ...],
        asked: Labelling,
        fresh: bool,
    ) -> None:
        self.clip, self.rate, self.about, self.digest = clip, rate, about, digest
        self.classes, self.asked, self.fresh = classes, asked, fresh
        self.key = settings_digest({"content": digest, "settings": about["fingerprint"]})
        self.totals = self._sums()
        self.complete, self.mark = False, place_digest(clip.path)
        self.labels, self.size, self.count = clip.folder / f"{clip.stem}.labels", (0, 0), 0
        self.writer: VideoWriter | None = None
        self._earlier: dict[str, dict[str, Any]] = {}  # states of label maps of an earlier run, by file name
        self._held = ExitStack()

    def __enter__(self) -> ClipResults:
        clip = self.clip
        clip.folder.mkdir(parents=True, exist_ok=True)
        require_ours(clip.folder, clip.stem, clip.path)
        with ExitStack() as held:
            self.labels.mkdir(exist_ok=True)
            held.enter_context(exclusive(self.labels, seconds=1))
            self.scratch = held.enter_context(temporary_folder(clip.folder))
            clip.result("json").unlink(missing_ok=True)
            for path in self.labels.iterdir():
                state = None if self.fresh else self._state(path)
                if state is None:
                    path.unlink()
                else:
                    self._earlier[path.name] = state
            self._held = held.pop_all()
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

    def kept(self, frame: Frame) -> tuple[Tensor, Totals] | None:
        """A frame's labels and sums, if an earlier run has written them."""
        path = self._path(frame)
        state = self._earlier.pop(path.name, None)
        if state is None:
            return None
        try:
            with opened(path, "labels", self.size[0] * self.size[1]) as image:
                image.verify()  # to the end of the file, which decoding does not need
            with opened(path, "labels", None) as image:
                array = np.array(image)
            sums = self._sums()
            sums.restore(state["sums"])
            if array.shape != self.size or array.dtype != np.uint16 or state["labels"] != _digest(array):
                return None
        except Exception:  # damaged files raise errors of many types
            return None
        labels = array.astype(np.int32)
        labels[array == UNLABELLED_VALUE] = NONE
        return torch.from_numpy(labels), sums

    def write(self, frame: Frame, labels: Tensor, scores: Tensor) -> Totals:
        """Write the label map of a frame; return its sums. From any thread."""
        sums, path, picture = self._sums(), self._path(frame), label_png(labels)
        sums.add(labels, scores)
        info = png_mark(self.mark)
        state = {"key": self.key, "labels": _digest(np.array(picture)), "sums": sums.state()}
        info.add_text(_SUMS, json.dumps(state))
        picture.save(self.scratch / path.name, pnginfo=info)
        os.replace(self.scratch / path.name, path)
        return sums

    def add(self, frame: Frame, painted: NDArray[np.uint8], sums: Totals) -> None:
        """Append a frame, whose label map is in place, to the overlay and the sums."""
        assert self.writer is not None
        self.writer.add(painted, frame.time)
        self.totals.include(sums)
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._held:
            self._put_in_place()

    def _sums(self) -> Totals:
        return Totals(self.classes, self.asked.min_score is not None)

    def _path(self, frame: Frame) -> Path:
        return self.labels / f"{frame.index:06d}.png"

    def _state(self, path: Path) -> dict[str, Any] | None:
        """A label map's key, digest and sums; None if it is of another video or other settings."""
        try:
            with opened(path, "labels", None) as image:
                state = json.loads(image.info[_SUMS])
            return state if state["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

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
            "content": self.digest if self.complete else None,  # the next run continues it
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


def _digest(labels: NDArray[np.uint16]) -> str:
    """The digest of a label map's pixels, which an image editor may change without its text."""
    return hashlib.blake2b(np.ascontiguousarray(labels).tobytes(), digest_size=16).hexdigest()
