"""CATSeg, the drop-in: upstream's model with checkpoints, class lists, back ends and `segment()`."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from catseg_fast.aggregator import Aggregator
from catseg_fast.backend import choose_backend, default_device
from catseg_fast.checkpoint import IGNORED_KEYS, load_into, read_checkpoint, recognise_variant, resolve
from catseg_fast.class_parallel import SOFTMAX, ClassShare
from catseg_fast.config import Variant, get_variant
from catseg_fast.engine import Engine
from catseg_fast.images import ImageLike, load_image
from catseg_fast.label_map import READOUT_BYTES, LabelMap, Probabilities, Readout, Target, TopClasses, reader
from catseg_fast.plan import Plan
from catseg_fast.planner import format_bytes
from catseg_fast.reference import model as reference_model
from catseg_fast.reference.inference import pad_to_multiple
from catseg_fast.reference.model import as_map, normalise
from catseg_fast.terms import VocabularyTerms
from catseg_fast.vocabulary import check_classes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Segmentation:
    """The answer for one picture.

    Attributes:
        labels: index into `classes` of each pixel's best class, int32 `[H, W]`, on the CPU.
        scores: that class's probability, float32 `[H, W]`, on the CPU.
        classes: the class names.
        top_labels, top_scores: the best k classes and their probabilities, best first, `[k, H, W]`, where
            they were asked for.
    """

    labels: Tensor
    scores: Tensor
    classes: tuple[str, ...]
    top_labels: Tensor | None = None
    top_scores: Tensor | None = None


class CATSeg(reference_model.CATSeg):
    """CAT-Seg with upstream's call contract and state dict, on exchangeable back ends.

    Args:
        variant: name of a published variant (`catseg_fast.config.VARIANTS`), or a `Variant`.
        classes: class names; `set_classes` changes them.
        backend: "auto", "triton", "torch" or "reference"; may be set later, too.
        max_classes: above this number of classes only the best of each crop are aggregated; None aggregates
            all. By default as upstream has it: 256 in v2, None in v1.
        memory_budget: bytes (or "2GiB") that a call may take above weights and inputs; by default what is
            free. `engine` has further settings.
        **kwargs: further arguments of `catseg_fast.reference.model.CATSeg`.
    """

    aggregator_type = Aggregator

    def __init__(
        self,
        variant: str | Variant = "v2-vitl",
        classes: Sequence[str] | None = None,
        *,
        backend: str = "auto",
        max_classes: int | Literal["upstream"] | None = "upstream",
        memory_budget: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(variant, classes, **kwargs)
        self.backend = backend
        if max_classes != "upstream":
            self.max_classes = max_classes
        self.engine.memory_budget = memory_budget
        self._vocabulary: tuple[tuple[Tensor, Plan, int | None], VocabularyTerms] | None = None

    @property
    def aggregator(self) -> Aggregator:
        aggregator = super().aggregator
        assert isinstance(aggregator, Aggregator)
        return aggregator

    @property
    def engine(self) -> Engine:
        """Runs the aggregator but for the reference back end; memory policy and precision are set here."""
        return self.aggregator.engine

    @property
    def backend(self) -> str:
        return self.aggregator.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.aggregator.backend = backend

    @property
    def max_classes(self) -> int | None:
        return self.aggregator.max_classes

    @max_classes.setter
    def max_classes(self, count: int | None) -> None:
        self.aggregator.max_classes = count

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        classes: Sequence[str] | None = None,
        *,
        variant: str | Variant | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> Self:
        """A model in evaluation mode with a checkpoint's weights.

        Args:
            source: a `.pth` or `.safetensors` file, a folder with one, or an id on the Hugging Face Hub.
            classes: class names.
            variant: what the checkpoint must be; by default what its keys and shapes say.
            device: where the model goes; by default a GPU where there is one.
            dtype: type of the weights.
            **kwargs: further arguments of the constructor.

        Raises:
            FileNotFoundError, RuntimeError: if there is no such file, or the hub cannot be reached.
            ValueError: if the file is no checkpoint, or not one of this variant; the message says what the
                file looks like.
        """
        path = resolve(source)
        state_dict = read_checkpoint(path)
        if variant is None:
            try:
                variant = recognise_variant(state_dict)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        with torch.device("meta"):
            model = cls(get_variant(variant), classes, **kwargs)
        if any(IGNORED_KEYS.search(key) for key in model.state_dict().keys() - state_dict.keys()):
            # Derived buffers are not in the file: they must be computed, and the meta device cannot.
            model = cls(variant, classes, **kwargs)
        load_into(model, state_dict, str(path))
        return model.to(device or default_device(), dtype).eval()

    def split_classes(self, group: ProcessGroup | None = None) -> None:
        """Let each rank of a process group hold a share of the classes, from now on.

        All ranks, with the same weights, settings and class names, must then call `segment` or `label_map`
        with the same pictures, in the same order; each gets the whole answer. A rank encodes the texts of its
        own classes alone. Other calls raise: no rank has all the probabilities.

        Args:
            group: by default all processes of `torch.distributed`.

        Raises:
            ValueError: if no classes are set, or class attention is by softmax, which needs every class.
        """
        if not all(layer.classes.linear for layer in self.engine.plan().layers):
            raise ValueError(SOFTMAX)
        self._share_out(ClassShare(self.classes, group))

    def set_classes(self, classes: Sequence[str], training: bool = False) -> None:
        share = self.engine.share
        if share is None:
            super().set_classes(classes, training)
        elif training:
            raise RuntimeError("class parallel: a model whose classes are split cannot be trained")
        else:
            self._share_out(ClassShare(check_classes(classes), share.group))

    def _share_out(self, share: ClassShare) -> None:
        self._keep_classes(share.classes, share.classes[share.own], training=False)
        self.engine.share = share

    def forward(
        self, batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """As `catseg_fast.reference.model.CATSeg`; in evaluation mode without gradients.

        Raises:
            RuntimeError: if the classes are split over ranks.
        """
        if self.engine.share is not None:
            raise RuntimeError("class parallel: no rank has all classes; call segment() or label_map()")
        if self.training:
            return super().forward(batched_inputs)
        results = []
        for image, readout in self._requests(batched_inputs):
            target = Probabilities(len(self.classes), readout.size, self.device)
            self._read_out(image, readout, target, target.maps.nbytes)
            results.append({"sem_seg": target.maps})
        return results

    def label_map(
        self, batched_inputs: Sequence[dict[str, Any]], *, top_k: int | None = None
    ) -> list[Segmentation]:
        """The argmax of the "sem_seg" of a call with the same input, without holding a map for each class.

        Args:
            batched_inputs: as in the call.
            top_k: also return so many classes a pixel.

        Raises:
            TypeError, ValueError: as the call; or if `top_k` is not positive.
        """
        return [self._label(image, readout, top_k) for image, readout in self._requests(batched_inputs)]

    def segment(
        self, image: ImageLike, *, sliding_window: bool | None = None, top_k: int | None = None
    ) -> Segmentation:
        """Label every pixel of a picture with one of the classes.

        Other than the call with upstream's contract, the whole-image path keeps the picture's geometry:
        nothing is padded or cut.

        Args:
            image: path, PIL image, numpy array `[H, W, 3]` or tensor `[3, H, W]`; RGB in 0..255.
            sliding_window: whether to look at overlapping crops; by default the model's own setting.
            top_k: also return so many classes a pixel.

        Raises:
            FileNotFoundError, TypeError, ValueError: if the image cannot be read or is none, no classes are
                set, or `top_k` is not positive.
        """
        pixels = load_image(image).to(self.device)
        sliding = self.sliding_window if sliding_window is None else sliding_window
        height, width = pixels.shape[-2:]
        return self._label(pixels, Readout((height, width), self.window if sliding else None), top_k)

    @torch.no_grad()
    def explain(self, crops: int | None = None) -> str:
        """How a call runs with the present classes and settings, and why; for `crops` crops (by default the
        sliding window's).

        Raises:
            ValueError: if no classes are set, or the memory budget is too small.
        """
        total, limit, share = len(self.classes), self.max_classes, self.engine.share
        kept = total if limit is None else min(total, limit)
        crops = crops or (len(self.window.corners()) + 1 if self.sliding_window else 1)
        backend = choose_backend(self.backend, self.device)
        lines = {"back end": f"{backend} (asked for: {self.backend})"}
        lines["classes"] = f"{total}, all aggregated" if kept == total else f"{total}, the best {kept} a crop"
        if share is not None:
            own = share.own.stop - share.own.start
            lines["ranks"] = f"{share.ranks}; rank {share.rank}, this one, has {own} of the classes"
            kept = min(kept, own)
        if backend != "reference":
            resolution = self.variant.feature_resolution
            schedule = self.engine.schedule(crops, resolution, kept, READOUT_BYTES)
            plan = self.engine.plan()
            lines["precision"] = str(plan.embed.dtype).removeprefix("torch.")
            for stage, reason in getattr(self.engine.stages(plan), "fallbacks", {}).items():
                lines["in torch"] = "; ".join(filter(None, [lines.get("in torch"), f"{stage} ({reason})"]))
            lines["policy"] = f"{schedule.policy}: {schedule.reason}"
            lines["step"] = f"{schedule.chunk} classes of {crops} crops"
            lines["memory"] = (
                f"{format_bytes(schedule.total_bytes)} above weights, inputs and answer "
                f"({format_bytes(schedule.fixed_bytes)} + {format_bytes(schedule.class_bytes)} a class in a "
                f"step); {format_bytes(schedule.budget)} may be taken"
            )
        return "\n".join(f"{name:<10} {value}" for name, value in lines.items())

    def _requests(self, batched_inputs: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, Readout]]:
        """Each image and how upstream's call answers it."""
        for index, entry in enumerate(batched_inputs):
            image = self._to_device(entry, index)
            height, width = self.window.resolution if self.sliding_window else image.shape[-2:]
            size = (entry.get("height", height), entry.get("width", width))
            if self.sliding_window:
                yield image, Readout(size, self.window)
            else:
                yield image, Readout(size, None, (height, width))

    def _label(self, image: Tensor, readout: Readout, top_k: int | None) -> Segmentation:
        if top_k is not None and top_k <= 0:
            raise ValueError(f"top_k: {top_k} is not positive")
        count = min(top_k or 1, len(self.classes))
        target: LabelMap | TopClasses = LabelMap(readout.size, self.device)
        if top_k is not None:
            target = TopClasses(count, readout.size, self.device)
        share, target_bytes = self.engine.share, 8 * count * readout.size[0] * readout.size[1]
        if share is None:
            self._read_out(image, readout, target, target_bytes)
        else:
            with share.together():
                settings = (top_k or 0, self.max_classes or 0, readout.window is not None)
                share.check_same(image, *readout.size, *settings)
                self._read_out(image, readout, target, target_bytes)
                share.merge(target, count)
        labels, scores = target.labels.cpu(), target.scores.cpu()
        if top_k is None:
            return Segmentation(labels, scores, self.classes)
        return Segmentation(labels[0], scores[0], self.classes, labels, scores)

    @torch.no_grad()
    def _read_out(self, image: Tensor, readout: Readout, target: Target, target_bytes: int) -> None:
        """Run the model on an image and read the logits out into `target`."""
        if readout.window is not None:
            inputs = normalise(readout.window.crops(image))
        else:
            inputs = normalise(image[None])
            if readout.visible is not None:  # upstream's call
                clip_images, images = inputs
                inputs = (
                    pad_to_multiple(clip_images, self.size_divisibility),
                    pad_to_multiple(images, self.size_divisibility),
                )
        features, guidance = self.encode_images(*inputs)
        backend = choose_backend(self.backend, self.device)
        if backend == "reference":
            if self.engine.share is not None:
                raise RuntimeError("class parallel: the back end 'reference' takes all classes at once")
            text = self.text_features().to(features.dtype).expand(len(features), -1, -1, -1)
            consume = reader(readout, target)
            consume(slice(0, len(self.classes)), self.aggregator(as_map(features), text, guidance))
            return
        self.engine.stream(
            as_map(features), self._vocabulary_terms(), guidance, self.max_classes,
            lambda: reader(readout, target, backend), target_bytes + max(READOUT_BYTES, readout.class_bytes),
        )  # fmt: skip

    def _vocabulary_terms(self) -> VocabularyTerms:
        """The engine's terms of the present classes, kept until these, a weight, or `max_classes` change."""
        text, plan = self.text_features(), self.engine.plan()
        key = (text, plan, self.max_classes)
        if self._vocabulary is None or not all(map(operator.is_, self._vocabulary[0], key)):
            self._vocabulary = (key, self.engine.vocabulary(text[None], self.max_classes))
        return self._vocabulary[1]
