"""A video of overlays, frame by frame."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catseg_fast.identity import file_mark

_TICKS = 90_000  # per second


class VideoWriter:
    """Encodes pictures as an MP4 file, H.264 where PyAV has it; `close` completes the file.

    Args:
        path: the file.
        size: (height, width) of all pictures.
        rate: pictures per second, for players that use it; each picture is shown at its own time.
        mark: the value of the mark that identifies the picture of the result.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction, mark: str) -> None:
        import av

        self.size, self._last = size, -1
        self._container = av.open(str(path), "w", format="mp4")
        self._container.metadata["comment"] = file_mark(mark)
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream: Any = self._container.add_stream(codec, rate=rate.limit_denominator(10_000))
        stream.height, stream.width = (side + side % 2 for side in size)  # chroma has half the size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS)
        if codec == "libx264":
            stream.options = {"crf": "20", "preset": "veryfast"}
        else:
            stream.codec_context.bit_rate = 8 * size[0] * size[1]
        self._stream = stream

    def add(self, picture: NDArray[np.uint8], time: Fraction) -> None:
        """Append a picture `[H, W, 3]` that is shown from `time` seconds on."""
        import av

        height, width = self.size
        padded = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
        self._last = max(self._last + 1, round(time * _TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write buffered frames, and the file's index."""
        try:
            if self._last >= 0:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()
