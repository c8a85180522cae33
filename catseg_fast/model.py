"""CATSeg, the drop-in: upstream's model with checkpoints, class lists, back ends and `segment()`."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Self

from catseg_fast.aggregator import Aggregator
from catseg_fast.backend import choose_backend, default_device
from catseg_fast.checkpoints.checkpoint import (
    IGNORED_KEYS,
    load_into,
    read_checkpoint,
    recognise_variant,
    resolve,
)
from catseg_fast.config import MAX_PIXELS, Variant, get_variant
from catseg_fast.console import late_progress
from catseg_fast.engine.class_parallel import SOFTMAX, ClassShare
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.folding import Plan
from catseg_fast.engine.loss import segmentation_loss
from catseg_fast.engine.precision import text_dtype
from catseg_fast.engine.recording import AFTER, Recorder
from catseg_fast.engine.terms import VocabularyTerms
from catseg_fast.errors import InputError, RunError
from catseg_fast.inference.encoding import LARGE_PIXELS, EncodedImage, encode
from catseg_fast.inference.explain import explain
from catseg_fast.inference.graphs import ModelGraphs
from catseg_fast.inference.images import ImageLike, as_floats, check_max_pixels, load_image, load_pixels
from catseg_fast.inference.readout import (
    Probabilities,
    Readout,
)
from catseg_fast.inference.segment import label, label_pixels, read_out
from catseg_fast.inference.segmentation import Segmentation, kept_image
from catseg_fast.inference.tiles import segment_tiles
from catseg_fast.labels import check_min_score
from catseg_fast.numeric import flag, whole
from catseg_fast.reference import model as reference_model
from catseg_fast.reference.requests import check_requests
from catseg_fast.text.features import Progress, TextEncoder
from catseg_fast.text.features_cache import FeaturesCache
from catseg_fast.text.fold import ClassNames, Fold, split_fold
from catseg_fast.text.prompts import check_classes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CATSeg(reference_model.CATSeg):
    """CAT-Seg with upstream's call contract and state dict, on exchangeable back ends.

    Args:
        variant: name of a published variant (`catseg_fast.config.VARIANTS`), or a `Variant`.
        classes: class names, or each class's several names; `set_classes` changes them.
        backend: "auto", "triton", "torch" or "reference"; may be set later, too.
        max_classes: above this number of classes only the best of each crop are aggregated; None aggregates
            all. By default as upstream has it: 256 in v2, None in v1.
        memory_budget: bytes (or "2GiB") that a call may take above weights and inputs; by default what is
            free. `engine` has further settings.
        text_cache: True to keep text features in the user's cache folder, so that the next start with the
            same classes encodes none; False for not; another folder; or a `FeaturesCache` with its own limit.
        max_pixels: most pixels of a picture's file, looked up before it is decoded; None for no limit.
        **kwargs: further arguments of `catseg_fast.reference.model.CATSeg`.
    """

    aggregator_type = Aggregator
    _fold: Fold | None = None

    def __init__(
        self,
        variant: str | Variant = "v2-vitl",
        classes: ClassNames | None = None,
        *,
        backend: str = "auto",
        max_classes: int | Literal["upstream"] | None = "upstream",
        memory_budget: int | str | None = None,
        text_cache: bool | str | os.PathLike[str] | FeaturesCache = True,
        max_pixels: int | None = MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        names, fold = (None, None) if classes is None else split_fold(classes)
        super().__init__(variant, names, **kwargs)
        self._fold = fold
        self.text_encoder = TextEncoder(FeaturesCache.of(text_cache))
        self.backend, self.max_pixels = backend, check_max_pixels(max_pixels)
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
        self.aggregator.max_classes = None if count is None else whole(count, "max_classes")

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        classes: ClassNames | None = None,
        *,
        variant: str | Variant | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        sha256: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A model in evaluation mode with a checkpoint's weights.

        Args:
            source: a `.pth` or `.safetensors` file, a folder with one, or an id on the Hugging Face Hub.
            classes: class names.
            variant: what the checkpoint must be; by default what its keys and shapes say.
            device: where the model goes; by default a GPU where there is one.
            dtype: type of the weights.
            revision: branch, tag or commit of the repository on the hub; by default its main branch.
            sha256: the SHA-256 that the file must have, as 64 hexadecimal digits.
            **kwargs: further arguments of the constructor.

        Raises:
            FileNotFoundError, RuntimeError: if there is no such file, or the hub cannot be reached.
            InputError: if the file is not a checkpoint, or not of this variant, and the message says what
                it looks like; or if its digest is another one.
        """
        if isinstance(classes, Mapping):
            split_fold(classes)
        elif classes is not None:
            classes = check_classes(classes)  # before a download, and before the weights are read
        path = resolve(source, revision=revision, sha256=sha256)
        state_dict = read_checkpoint(path)
        if variant is None:
            try:
                variant = recognise_variant(state_dict)
            except ValueError as error:
                raise InputError(f"{path}: {error}") from error
        with torch.device("meta"):
            model = cls(get_variant(variant), classes, **kwargs)
        if any(IGNORED_KEYS.search(key) for key in model.state_dict().keys() - state_dict.keys()):
            # Derived buffers are not in the file: they must be computed, and the meta device cannot.
            model = cls(variant, classes, **kwargs)
        load_into(model, state_dict, str(path))
        return model.to(device or default_device(), dtype).eval()

    def split_classes(self, group: ProcessGroup | None = None) -> None:
        """Let each rank of a process group hold a share of the classes, from now on.

        All ranks, with the same weights, settings and class names, must then call `segment`, `segment_batch`,
        `encode` or `label_map` with the same pictures, in the same order; each gets the whole answer. A rank
        only encodes the texts of its own classes. Calls that need the probabilities of all classes raise.

        Args:
            group: by default all processes of `torch.distributed`.

        Raises:
            InputError: if no classes are set, or class attention is by softmax, which needs every class.
        """
        if not all(layer.classes.linear for layer in self.engine.plan().layers):
            raise InputError(SOFTMAX)
        self._share_out(ClassShare(self.classes, group))

    def set_classes(self, classes: ClassNames, training: bool = False) -> None:
        """Name the classes, or with `training` those of training mode; counts from the next call on.

        Classes that are split over ranks are split anew.

        Args:
            classes: their names; or a mapping from each class to its names, such as `{"sky": "sky",
                "background": ["wall", "floor"]}`. The names then compete separately, and `classes` are all
                names; what `segment` and `label_map` return is of the classes: see `label_classes`.
            training: whether these are the classes of training mode, which have one name each.

        Raises:
            TypeError, ValueError: if the list is empty, a name is blank or listed twice, or is too long for
                CLIP, or a class has no names. The present classes then stay.
            RunError: if classes for training are to be split over ranks.
        """
        share, (names, fold) = self.engine.share, split_fold(classes)
        if training and fold is not None:
            raise InputError("classes: in training each class has one name; give a list of names")
        if share is None:
            super().set_classes(names, training)
        elif training:
            raise RunError("class parallel: a model whose classes are split cannot be trained")
        else:
            self._share_out(ClassShare(check_classes(names), share.group))
        if not training:
            self._fold = fold

    @property
    def fold(self) -> Fold | None:
        """The fold of the present names into classes; None if each is a class of its own."""
        return None if self._class_mode() else self._fold

    @property
    def label_classes(self) -> tuple[str, ...]:
        """The classes of label indices: `classes`, or the classes that these names are folded into."""
        return self.classes if self.fold is None else self.fold.classes

    def _text_state(self) -> object:
        return super()._text_state(), self._text_dtype()

    def _text_dtype(self) -> torch.dtype:
        weight = self.clip_model.text_projection
        if self.training or choose_backend(self.backend, weight.device) == "reference":
            return weight.dtype
        selects = self.max_classes is not None and len(self.classes) > self.max_classes
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            return text_dtype(self.engine.precision, weight, selects)

    def _encode_text(self, tokens: Sequence[Tensor], progress: Progress | None) -> Tensor:
        prompts, dtype = len(self.templates), self._text_dtype()
        with late_progress("Encoding class names") as bar:
            return self.text_encoder.encode(self.clip_model, tokens, prompts, dtype, progress or bar)

    def _share_out(self, share: ClassShare) -> None:
        self._keep_classes(share.classes, share.classes[share.own], training=False)
        self.engine.share = share

    def forward(
        self, batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Run `catseg_fast.reference.model.CATSeg`'s call; in evaluation mode without gradients.

        Of classes with several names, "sem_seg" has a map of each name.

        Raises:
            RunError: if the classes are split over ranks.
        """
        if self.engine.share is not None:
            raise RunError("class parallel: no rank has all classes; call segment() or label_map()")
        if self.training:
            return super().forward(batched_inputs)
        results = []
        for image, readout in self._requests(batched_inputs):
            target = Probabilities(len(self.classes), readout.size, self.device)
            read_out(self, self._encode([image], [readout]), [target], target.maps.nbytes)
            results.append({"sem_seg": target.maps})
        return results

    def _criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        if choose_backend(self.backend, logits.device) == "reference":
            return super()._criterion(logits, labels)
        return segmentation_loss(logits, labels, self.ignore_label)

    def label_map(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        *,
        top_k: int | None = None,
        min_score: float | None = None,
    ) -> list[Segmentation]:
        """The argmax of the "sem_seg" of a call with the same input, without holding a map for each class.

        Args:
            batched_inputs: as in the call.
            top_k: number of classes per pixel to return as well.
            min_score: as in `segment`.

        Raises:
            TypeError, ValueError: as the call; or if `top_k` is not positive, or `min_score` not in 0..1.
        """
        _check_min_score(min_score)
        requests = self._requests(batched_inputs)
        answers = (self._label(image, readout, top_k) for image, readout in requests)
        return [answer.drop_below(min_score) for answer in answers]

    def encode(self, image: ImageLike, *, sliding_window: bool | None = None) -> EncodedImage:
        """Run all that does not depend on the classes; `segment` takes the answer in place of the picture.

        It serves as long as the weights stay. Arguments and errors as of `segment`.
        """
        return self._encode_all([image], sliding_window)[0]

    @overload
    def segment(
        self,
        image: ImageLike | EncodedImage,
        *,
        sliding_window: bool | None = None,
        top_k: int | None = None,
        min_score: float | None = None,
        keep_logits: bool = False,
        tiles: int | None = None,
        overlap: int | None = None,
    ) -> Segmentation: ...

    @overload
    def segment(
        self,
        image: list[Any] | tuple[Any, ...],
        *,
        sliding_window: bool | None = None,
        top_k: int | None = None,
        min_score: float | None = None,
        keep_logits: bool = False,
        tiles: int | None = None,
        overlap: int | None = None,
    ) -> list[Segmentation]: ...

    def segment(
        self,
        image: ImageLike
        | EncodedImage
        | list[ImageLike | EncodedImage]
        | tuple[ImageLike | EncodedImage, ...],
        *,
        sliding_window: bool | None = None,
        top_k: int | None = None,
        min_score: float | None = None,
        keep_logits: bool = False,
        tiles: int | None = None,
        overlap: int | None = None,
    ) -> Segmentation | list[Segmentation]:
        """Label every pixel of a picture with one of the classes.

        Other than the call with upstream's contract, the whole-image path keeps the picture's geometry:
        nothing is padded or cut.

        Args:
            image: path, URL, a file's content as bytes, binary file, PIL image, numpy array `[H, W, 3]` or
                tensor `[3, H, W]`, RGB in 0..255; see `catseg_fast.inference.images.load_image`. Or what
                `encode` made of one. A list or tuple of these is segmented one after the other, into a list.
            sliding_window: whether to look at overlapping crops; by default the model's own setting.
            top_k: number of classes per pixel to return as well.
            min_score: label pixels -1, "none of these", whose best class has a smaller probability. Each
                class's probability is a sigmoid of its own, so that this is exact; `scores` stay.
            keep_logits: let the answer have a `score_map` of every class; 37 KB per class and crop in fp32.
            tiles: side in pixels of square tiles, each of which is segmented as a picture, for pictures that
                are much larger than what the model looks at; seams are averaged as those of crops are.
            overlap: pixels that a tile shares with the next one; by default an eighth.

        Raises:
            FileNotFoundError, TypeError, ValueError: if the image cannot be read, has more than `max_pixels`,
                is none, or was encoded otherwise; if no classes are set, `top_k` is not positive, or
                `min_score` is not in 0..1; or if tiles are smaller than the model's window, overlap by more
                than half, or come with an encoded picture, `top_k` or `keep_logits`.
        """
        _check_min_score(min_score)
        if tiles is None and overlap is not None:
            raise InputError(f"overlap: {overlap} without tiles; pass tiles=SIZE, too")
        if isinstance(image, list | tuple):
            return [
                self.segment(
                    each, sliding_window=sliding_window, top_k=top_k, min_score=min_score,
                    keep_logits=keep_logits, tiles=tiles, overlap=overlap,
                )
                for each in image
            ]  # fmt: skip
        if tiles is not None:
            if isinstance(image, EncodedImage) or keep_logits or top_k is not None:
                raise InputError("tiles: not with an encoded picture, top_k or keep_logits")
            pixels = load_image(image, max_pixels=self.max_pixels)
            tiled = segment_tiles(
                self, pixels, tiles, overlap, sliding_window=sliding_window, min_score=min_score
            )  # fmt: skip
            return replace(tiled, image=kept_image(image, pixels))
        if isinstance(image, EncodedImage) or keep_logits:
            answer = label(self, self._encode_all([image], sliding_window), top_k, keep_logits)[0]
            return answer.drop_below(min_score)
        sliding = self._slides(sliding_window)
        pixels = self._load(image)
        readout = Readout((pixels.shape[1], pixels.shape[2]), self.window if sliding else None)
        if pixels.dtype != torch.uint8:
            answer = replace(self._label(pixels, readout, top_k), image=kept_image(image, pixels))
            return answer.drop_below(min_score)
        encoded = replace(self._encode([pixels], [readout])[0], image=kept_image(image, pixels))
        del pixels  # a large picture's, before the labels take as much memory
        return label(self, [encoded], top_k)[0].drop_below(min_score)

    def segment_batch(
        self,
        images: Sequence[ImageLike | EncodedImage],
        *,
        sliding_window: bool | None = None,
        top_k: int | None = None,
        min_score: float | None = None,
    ) -> list[Segmentation]:
        """`segment` of several pictures with all crops in one call; equal to one by one but for rounding.

        It pays where few classes leave a GPU idle. Memory grows with the number of pictures.
        """
        _check_min_score(min_score)
        answers = label(self, self._encode_all(images, sliding_window), top_k) if images else []
        return [answer.drop_below(min_score) for answer in answers]

    def warmup(self, sizes: Sequence[tuple[int, int]], *, sliding_window: bool | None = None) -> None:
        """Do now what the first calls would wait for, with the present classes, weights and settings.

        Text features are computed, kernels are compiled and checked, and on a GPU the calls of `segment` for
        pictures of these sizes are recorded as graphs, if `engine.graphs` is "auto". Other sizes of pictures
        have the same kernels. All ranks that share the classes must call together.

        Args:
            sizes: (height, width) of the pictures to come.
            sliding_window: as in `segment`.

        Raises:
            InputError: if there are no sizes, one is not positive, or no classes are set.
        """
        if not sizes:
            raise InputError("sizes: there are none; give the (height, width) of a picture")
        for height, width in sizes:
            whole(height, "sizes")
            whole(width, "sizes")
        for height, width in sizes:
            picture = torch.zeros(3, height, width, dtype=torch.uint8)
            for _ in range(1 if self.device.type == "cpu" else AFTER + 1):
                self.segment(picture, sliding_window=sliding_window)

    def cuda_graph(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        sliding_window: bool | None = None,
        probabilities: bool = False,
    ) -> ModelGraphs:
        """Record `segment` for pictures of some sizes (height, width) as CUDA graphs.

        They hold the present classes, weights and settings; see `catseg_fast.inference.graphs.ModelGraphs`.

        Raises:
            RunError: if the model is not on a CUDA GPU.
            InputError: if there are no sizes, or the model selects classes.
        """
        record = Recorder(self.device)
        return ModelGraphs(self, sizes, record, sliding_window=sliding_window, probabilities=probabilities)

    @torch.no_grad()
    def explain(self, crops: int | None = None) -> str:
        """Describe how a call runs with the present classes and settings, and why.

        Args:
            crops: number of crops; by default the sliding window's.

        Raises:
            InputError: if no classes are set, or the memory budget is too small.
        """
        return explain(self, None if crops is None else whole(crops, "crops"))

    def _label(self, pixels: Tensor, readout: Readout, top_k: int | None) -> Segmentation:
        if top_k is None and self.engine.share is None:
            return label_pixels(self, pixels, readout)
        return label(self, self._encode([pixels], [readout]), top_k)[0]

    def _requests(self, batched_inputs: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, Readout]]:
        """Each image and how upstream's call answers it."""
        check_requests(batched_inputs)
        for entry in batched_inputs:
            image = entry["image"].to(self.device, torch.float32)
            height, width = self.window.resolution if self.sliding_window else image.shape[-2:]
            size = (entry.get("height", height), entry.get("width", width))
            if self.sliding_window:
                yield image, Readout(size, self.window)
            else:
                yield image, Readout(size, None, (height, width))

    def _slides(self, sliding_window: bool | None) -> bool:
        """The setting of the sliding window: a call's own, or the model's."""
        return flag(self.sliding_window if sliding_window is None else sliding_window, "sliding_window")

    def _load(self, image: ImageLike) -> Tensor:
        """A picture's pixels `[3, H, W]` on the device: floats, or bytes of a large one."""
        pixels = load_pixels(image, max_pixels=self.max_pixels)
        if pixels.dtype == torch.uint8 and pixels[0].numel() > LARGE_PIXELS:
            return pixels.to(self.device)
        return as_floats(pixels, self.device)

    def _encode_all(
        self, images: Sequence[ImageLike | EncodedImage], sliding_window: bool | None
    ) -> list[EncodedImage]:
        """The encoded pictures among `images`, and the others encoded in one call."""
        sliding = self._slides(sliding_window)
        pixels, readouts, sources = [], [], []
        for image in images:
            if isinstance(image, EncodedImage):
                image.check(self.aggregator.conv1.weight, sliding_window)
                continue
            pixels.append(self._load(image))
            sources.append(kept_image(image, pixels[-1]))
            height, width = pixels[-1].shape[-2:]
            readouts.append(Readout((height, width), self.window if sliding else None))
        encoded = self._encode(pixels, readouts) if pixels else []
        fresh = map(lambda each, source: replace(each, image=source), encoded, sources)
        return [image if isinstance(image, EncodedImage) else next(fresh) for image in images]

    def _encode(self, images: Sequence[Tensor], readouts: Sequence[Readout]) -> list[EncodedImage]:
        """`catseg_fast.inference.encoding.encode`, where classes are shared on all ranks alike."""
        share = self.engine.share
        if share is None:
            return encode(self, images, readouts)
        pixels = [(image.shape, _sum(image)) for image in images]
        with share.together(self.device, pixels, readouts):
            return encode(self, images, readouts)

    def vocabulary_terms(self, plan: Plan | None = None) -> VocabularyTerms:
        """Return the terms of the present classes, kept until these, a weight, or `max_classes` change.

        Args:
            plan: the folded weights, if the caller has them.
        """
        text, plan = self.text_features(), plan or self.engine.plan()
        key = (text, plan, self.max_classes)
        if self._vocabulary is None or not all(map(operator.is_, self._vocabulary[0], key)):
            self._vocabulary = (key, self.engine.vocabulary(text[None], self.max_classes, plan))
        return self._vocabulary[1]


def _sum(image: Tensor) -> int:
    """The sum of an image's values, without a copy of all of them."""
    return sum(int(part.long().sum()) for part in image.flatten().split(2**24))


def _check_min_score(min_score: float | None) -> None:
    """Raise before anything is computed."""
    if min_score is not None:
        check_min_score(min_score)
