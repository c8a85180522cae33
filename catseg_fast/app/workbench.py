"""Functions behind the page: encoded pictures, class lists, times and memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor

from catseg_fast.app.memory_meter import MemoryMeter
from catseg_fast.backend import BACKENDS, choose_backend
from catseg_fast.config import MAX_PIXELS
from catseg_fast.engine.schedule import format_bytes
from catseg_fast.errors import RunError
from catseg_fast.files import file_digest, open_regular
from catseg_fast.inference.encoding import EncodedImage
from catseg_fast.inference.images import load_bytes
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.model import CATSeg
from catseg_fast.text.class_lists import Names, parse_classes
from catseg_fast.text.features import Progress
from catseg_fast.text.fold import split_fold

MAX_SIDE = 1600  # larger pictures are reduced: the model uses 640 pixels in any case
REFERENCE_BYTES = 2**23  # per class and crop in the plain model; 7.2 MB were measured


@dataclass(frozen=True)
class Loaded:
    """A picture, and its features, which do not depend on the classes.

    Attributes:
        key: the file's content, and whether the sliding window was used.
        photo: uint8 `[3, H, W]`.
    """

    key: tuple[str, bool]
    photo: Tensor
    encoded: EncodedImage


@dataclass(frozen=True)
class Report:
    """Seconds of the stages, None if the result was kept from before; and memory in bytes.

    Attributes:
        encoding: seconds for the picture.
        text: seconds for the class names.
        aggregation: seconds from both to the label map.
        peak: highest memory of all three besides the memory held before.
        held: all memory held at that time.
        plan: description of the run by `CATSeg.explain`.
    """

    encoding: float | None
    text: float | None
    aggregation: float
    peak: int
    held: int
    plan: str


class Workbench:
    """One model for all visitors of the page; only one can call `segment` at a time.

    Args:
        model: of any classes.
        most_logits: bytes of logits that an answer may have; above them, it has none.
    """

    def __init__(self, model: CATSeg, most_logits: int = 2**29) -> None:
        self.model, self.most_logits = model, most_logits
        self._text_ready: tuple[str, ...] = ()

    def backends(self) -> list[str]:
        """Return the back ends that run on the model's device."""
        return [name for name in BACKENDS if self._runs(name)]

    def segment(
        self,
        path: str | Path,
        classes: Names,
        loaded: Loaded | None = None,
        *,
        backend: str = "auto",
        max_classes: int | None = None,
        sliding_window: bool = True,
        progress: Progress | None = None,
    ) -> tuple[Loaded, Segmentation, Report]:
        """Segment a picture; if it is the picture that was `loaded` before, it is not encoded again.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `CATSeg.segment` and `set_classes`.
            RunError: if the reference back end would need more memory than there is.
        """
        model = self.model
        model.backend, model.max_classes = backend, max_classes
        names, fold = split_fold(classes)
        if (tuple(names), fold) != (model.classes, model.fold):
            model.set_classes(classes)
        self._check_memory(sliding_window)
        with open_regular(path) as file:
            key = (file_digest(file, "sha256"), sliding_window)
        encoding = text = None
        with MemoryMeter(model.device) as meter:
            if loaded is None or loaded.key != key:
                start = time.perf_counter()
                photo = load_photo(path, model.max_pixels)
                loaded = Loaded(key, photo, model.encode(photo, sliding_window=sliding_window))
                encoding = self._since(start)
            start = time.perf_counter()
            with torch.no_grad():
                model.text_features(progress)
            if self._text_ready != model.classes:
                text, self._text_ready = self._since(start), model.classes
            start = time.perf_counter()
            logits = len(loaded.encoded.features) * len(model.classes) * self._class_bytes()
            segmentation = model.segment(loaded.encoded, keep_logits=logits <= self.most_logits)
            aggregation = self._since(start)
        plan = model.explain(len(loaded.encoded.features))
        return loaded, segmentation, Report(encoding, text, aggregation, meter.taken, meter.peak, plan)

    def _class_bytes(self) -> int:
        """Bytes of a class's logits in a crop."""
        height, width = self.model.variant.feature_resolution
        return 4 * (4 * height) * (4 * width)

    def _since(self, start: float) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() - start

    def _runs(self, backend: str) -> bool:
        try:
            choose_backend(backend, self.model.device)
        except RuntimeError:
            return False
        return True

    def _check_memory(self, sliding_window: bool) -> None:
        """Check that the reference back end, which holds every class at once, has enough memory."""
        model = self.model
        if choose_backend(model.backend, model.device) != "reference":
            return
        crops = model.window.count if sliding_window else 1
        count = min(len(model.classes), model.max_classes or len(model.classes))
        wanted = crops * max(count, model.variant.pad_len) * REFERENCE_BYTES
        free = psutil.virtual_memory().available
        if model.device.type == "cuda":
            free = torch.cuda.mem_get_info(model.device)[0]
        if wanted > free:
            raise RunError(
                f"backend: 'reference' holds all classes at once and needs about {format_bytes(wanted)} for "
                f"{count} classes and {crops} crops; {format_bytes(free)} are free"
            )


def read_names(text: str) -> Names:
    """Return class names from a text: separated by semicolons or lines; or the name of a ready list.

    Raises:
        InputError: if there is none.
    """
    return parse_classes(text.replace("\n", ";"))


def load_photo(path: str | Path, max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """Load an upright picture, uint8 `[3, H, W]`, at most `MAX_SIDE` pixels wide and high.

    Raises:
        FileNotFoundError, ValueError: if it cannot be read, or has more than `max_pixels`.
    """
    photo = load_bytes(path, max_pixels=max_pixels)
    if max(photo.shape) <= MAX_SIDE:
        return photo
    size, method = (MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS
    channels = [ImageOps.contain(Image.fromarray(channel.numpy()), size, method) for channel in photo]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])
