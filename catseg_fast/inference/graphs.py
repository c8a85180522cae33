"""CUDA graphs of `CATSeg.segment` that are recorded on request, for pictures of some sizes.

Equal calls are recorded without a request, too: see `catseg_fast.engine.recording`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from catseg_fast.engine.recording import ambient_settings, recordable
from catseg_fast.engine.schedule import Schedule
from catseg_fast.errors import InputError, RunError
from catseg_fast.inference.encoding import encode, image_tower
from catseg_fast.inference.images import ImageLike, load_image
from catseg_fast.inference.readout import READOUT_BYTES, LabelMap, Probabilities, Readout
from catseg_fast.inference.segment import read_out
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.numeric import flag
from catseg_fast.weights import WeightsState, module_tensors

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg

Answer = TypeVar("Answer")
Size = tuple[int, int]


class ModelGraphs:
    """`CATSeg.segment` for pictures of some sizes, one recording each; `CATSeg.cuda_graph` makes it.

    Classes, weights and settings are those of the recording: a call after a change raises an error.

    Args:
        model: in evaluation mode.
        sizes: (height, width) of the pictures.
        sliding_window: as in `CATSeg.segment`.
        probabilities: whether a call returns all classes' probabilities, not the best class.
        record: makes a recording of a function, such as a `Recorder`.

    Raises:
        InputError: if there are no sizes, a size is not positive, or the model is in training mode.
        RunError: if not even host memory holds the state, which no recording can use.
    """

    def __init__(
        self,
        model: CATSeg,
        sizes: Sequence[Size],
        record: Callable[[Callable[[], Any]], Callable[[], Any]],
        *,
        sliding_window: bool | None = None,
        probabilities: bool = False,
    ) -> None:
        if not sizes or any(side < 1 for size in sizes for side in size):
            raise InputError(f"sizes: {list(sizes)} are not (height, width) of pictures, all above 0")
        if model.training:
            raise InputError("model: is in training mode; call model.eval() first")
        self.model, self.probabilities = model, probabilities
        sliding = model.sliding_window if sliding_window is None else sliding_window
        self.sliding_window = flag(sliding, "sliding_window")
        self._lock, self._turn = threading.Lock(), getattr(record, "turn", nullcontext)
        with recordable():
            self._settings = _settings(model)
            self._recordings = {tuple(size): self._record((size[0], size[1]), record) for size in sizes}
            # Recordings read these tensors, which the model may replace, though it may be set back later.
            plan = model.engine.plan()
            self._held = (plan, model.vocabulary_terms(plan), image_tower(model))

    @property
    def sizes(self) -> list[Size]:
        """The recorded (height, width)."""
        return list(self._recordings)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, image: ImageLike) -> Segmentation | Tensor:
        """Return the segmentation of a picture of a recorded size, or its probabilities `[T, H, W]`.

        A call that overflows fp16 is computed again without the recording, in bf16 and with a warning.

        Raises:
            RunError: if classes, weights or settings have changed since the recording.
            InputError: if the picture has another size; otherwise as in `CATSeg.segment`.
        """
        pixels = load_image(image, max_pixels=self.model.max_pixels)
        size = (pixels.shape[1], pixels.shape[2])
        if size not in self._recordings:
            raise InputError(f"image: its size {size} was not recorded; recorded are {self.sizes}")
        present = _settings(self.model)
        changed = [name for name, value in self._settings.items() if present[name] != value]
        if changed:
            raise RunError(
                f"cuda_graph: {' and '.join(changed)} changed since the recording; call cuda_graph again"
            )
        model, (buffer, replay) = self.model, self._recordings[size]
        with self._lock, self._turn():
            buffer.copy_(pixels)
            answer = replay()
            if self.probabilities:
                maps: Tensor = answer.maps.clone()
            else:
                segmentation = Segmentation.of(answer, model.classes, self._readout(size), fold=model.fold)
        if self.probabilities:
            return self._read_out(pixels.to(model.device)).maps if maps[0].isnan().any() else maps
        if segmentation.scores.isnan().any():
            return model.segment(image, sliding_window=self.sliding_window)
        return segmentation

    def _record(self, size: Size, record: Callable[[Callable[[], Any]], Callable[[], Any]]) -> Any:
        """Return the buffer for the pixels, and the replay of the call on it."""
        model, buffer = self.model, torch.zeros(3, *size, device=self.model.device)
        crops = model.window.count if self.sliding_window else 1
        total = len(model.classes)
        classes = total if model.max_classes is None else min(total, model.max_classes)
        answer_bytes = 4 * size[0] * size[1] * (total if self.probabilities else 2)
        output_bytes = answer_bytes + max(READOUT_BYTES, self._readout(size).class_bytes)
        resolution = model.variant.feature_resolution
        schedule = model.engine.schedule(crops, resolution, classes, output_bytes, classes < total)
        if schedule.policy == "offload":
            raise RunError(
                f"cuda_graph: {schedule.reason}, and copies to the host are not recorded; set "
                "model.engine.policy = 'recompute'"
            )
        return buffer, record(lambda: self._read_out(buffer, schedule, checked=False))

    def _readout(self, size: Size) -> Readout:
        return Readout(size, self.model.window if self.sliding_window else None)

    def _read_out(self, pixels: Tensor, schedule: Schedule | None = None, checked: bool = True) -> Any:
        """Read the picture's logits out, and return the target."""
        model, size = self.model, (pixels.shape[1], pixels.shape[2])
        target: Probabilities | LabelMap = LabelMap(size, model.device)
        if self.probabilities:
            target = Probabilities(len(model.classes), size, model.device)
        encoded = encode(model, [pixels], [self._readout(size)], checked)
        read_out(model, encoded, [target], schedule=schedule)
        return target


def _settings(model: CATSeg) -> dict[str, Any]:
    """Return everything that is constant in a recording, by name."""
    engine = model.engine
    return {
        "classes": (model.classes, model.fold),
        "weights": WeightsState(module_tensors(model, buffers=True)),
        "device": model.device,
        "precision": (engine.precision, engine.input_precision, engine.plan().embed.dtype),
        "backend": model.backend,
        "max_classes": model.max_classes,
        "window": model.window,
        "training mode": model.training,
        "PyTorch's settings of precision and autocast": ambient_settings(model.device),
    }
