"""Small videos, and their segmentation by the tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from catseg_fast import CATSeg
from catseg_fast.cli.labelling import Labelling
from catseg_fast.cli.video import Clips

HEIGHT, WIDTH = 33, 48


def scene(index: int) -> np.ndarray:
    """Return a frame `[H, W, 3]` whose grey encodes its number."""
    frame = np.full((HEIGHT + 1, WIDTH, 3), 10 + 9 * (index % 20), np.uint8)
    frame[4:12, 4 + index : 12 + index] = (200, 30, 60)
    return frame


def write_video(path: Path, count: int = 12, rate: int = 10, **options: str) -> Path:
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT + 1, "yuv420p", 10**6
        for index in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(index), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def decoded(path: Path) -> list[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def clips(model: CATSeg, **options: object) -> Clips:
    asked = Labelling(model, min_score=options.pop("min_score", None))  # type: ignore[arg-type]
    return Clips(asked, model.label_classes, {"fingerprint": "f"}, **options)  # type: ignore[arg-type]


def labels_in(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            found[path.stem] = np.array(image)
    return found
