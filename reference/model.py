"""The whole of CAT-Seg, image to probability maps; upstream `cat_seg/cat_seg_model.py` without detectron2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from catseg_fast.config import (
    CLIP_PIXEL_MEAN,
    CLIP_PIXEL_STD,
    CROP_SIZE,
    IGNORE_LABEL,
    PIXEL_MEAN,
    PIXEL_STD,
    Variant,
    get_variant,
)
from catseg_fast.errors import InputError
from catseg_fast.labels import class_indices
from catseg_fast.reference.aggregator import Aggregator
from catseg_fast.reference.finetune import freeze, segmentation_loss
from catseg_fast.reference.inference import SlidingWindow, pad_to_multiple, resize
from catseg_fast.reference.requests import check_requests
from catseg_fast.text.features import Progress, encode_classes
from catseg_fast.text.prompts import check_classes, get_templates
from catseg_fast.text.same_prompts import warn_of_same_prompts
from catseg_fast.text.tokens import tokenize_classes
from catseg_fast.weights import WeightsState

if TYPE_CHECKING:
    from catseg_fast.reference.clip import DenseCLIP


class CATSegPredictor(nn.Module):
    """CLIP and the aggregator, under upstream's names."""

    def __init__(self, clip_model: DenseCLIP, transformer: Aggregator) -> None:
        super().__init__()
        self.clip_model = clip_model
        self.transformer = transformer


class CATSegHead(nn.Module):
    """Holds the predictor, under upstream's name."""

    def __init__(self, predictor: CATSegPredictor) -> None:
        super().__init__()
        self.predictor = predictor


class CATSeg(nn.Module):
    """CAT-Seg with upstream's call contract and state dict.

    Args:
        variant: name of a published variant (`catseg_fast.config.VARIANTS`), or a `Variant`.
        classes: class names for inference; `set_classes` changes them.
        train_classes: class names in training mode; by default those for inference.
        sliding_window: whether inference uses overlapping crops and the whole image (upstream's evaluation),
            or only the whole image.
        window: sizes of the sliding window.
        prompt_ensemble: name of an ensemble or templates, instead of the variant's own.
        size_divisibility: multiple to which the whole image is padded in the call with upstream's contract.
        clip_finetune: the part of CLIP that is trained: "attention", "full", "prompt" or "none".
        train_backbone: whether v1's guidance backbone is trained.
        ignore_label: label of training pixels that belong to no class; may be set later, too.

    Raises:
        InputError: if a name or the class list is invalid.
    """

    aggregator_type: type[Aggregator] = Aggregator

    def __init__(
        self,
        variant: str | Variant = "v2-vitl",
        classes: Sequence[str] | None = None,
        *,
        train_classes: Sequence[str] | None = None,
        sliding_window: bool = True,
        window: SlidingWindow | None = None,
        prompt_ensemble: str | Sequence[str] | None = None,
        size_divisibility: int = 32,
        clip_finetune: str = "attention",
        train_backbone: bool = False,
        ignore_label: int = IGNORE_LABEL,
    ) -> None:
        super().__init__()
        # Before the towers are made, which takes seconds.
        classes = None if classes is None else check_classes(classes)
        train_classes = None if train_classes is None else check_classes(train_classes)
        self.ignore_label = ignore_label
        self.variant = get_variant(variant)
        self.sliding_window = sliding_window
        self.window = window or SlidingWindow()
        self.size_divisibility = size_divisibility
        self.templates = get_templates(prompt_ensemble or self.variant.prompt_ensemble)

        # open_clip and timm, which takes as long to import as torch: only where a model is built.
        from catseg_fast.reference.clip import DenseCLIP

        clip_model = DenseCLIP(self.variant.clip, self.variant.version)
        transformer = self.aggregator_type(**self.variant.aggregator_arguments(len(self.templates)))
        self.backbone = None
        if self.variant.backbone:
            from catseg_fast.reference.guidance import build_guidance

            self.backbone = build_guidance(self.variant.backbone)
        self.sem_seg_head = CATSegHead(CATSegPredictor(clip_model, transformer))
        if self.variant.version == "v2":
            width, dims = self.variant.clip.vision_width, self.variant.decoder_guidance_dims
            self.upsample1 = nn.ConvTranspose2d(width, dims[0], kernel_size=2, stride=2)
            self.upsample2 = nn.ConvTranspose2d(width, dims[1], kernel_size=4, stride=4)
        freeze(clip_model, self.backbone, clip_finetune, self.variant.version, train_backbone)

        self._classes: dict[bool, tuple[str, ...]] = {}  # by training mode
        self._tokens: dict[bool, list[Tensor]] = {}
        self._text_cache: dict[bool, tuple[object, Tensor]] = {}
        if classes is not None:
            self.set_classes(classes)
        if train_classes is not None:
            self.set_classes(train_classes, training=True)

    @property
    def clip_model(self) -> DenseCLIP:
        return self.sem_seg_head.predictor.clip_model

    @property
    def aggregator(self) -> Aggregator:
        return self.sem_seg_head.predictor.transformer

    @property
    def device(self) -> torch.device:
        return self.aggregator.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.aggregator.conv1.weight.dtype

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names of the present mode.

        Raises:
            InputError: if none were set.
        """
        return self._classes[self._class_mode()]

    def set_classes(self, classes: Sequence[str], training: bool = False) -> None:
        """Replace the class names for inference (or training); takes effect with the next call.

        Raises:
            TypeError, ValueError: if the list is empty, a name is blank or listed twice, or is too long for
                CLIP. The present classes then stay.
        """
        checked = check_classes(classes)
        self._keep_classes(checked, checked, training)

    def _keep_classes(self, classes: tuple[str, ...], encoded: Sequence[str], training: bool) -> None:
        """Replace the class names and, as a part of them, those whose text features are to be had here."""
        length = self.variant.clip.context_length
        tokens = tokenize_classes(encoded, self.templates, self.variant.version, length)
        warn_of_same_prompts(classes, self.templates, self.variant.version, length)
        self._classes[training], self._tokens[training] = classes, tokens
        self._text_cache.pop(training, None)

    def text_features(self, progress: Progress | None = None) -> Tensor:
        """Text features `[T, P, C]` of the present classes.

        They are kept until the classes or the text tower's weights change. Training v2 trains the text tower
        too, so there they are computed anew, with gradients.
        """
        mode = self._class_mode()
        tokens = self._tokens[mode]
        if self.training and self.variant.version == "v2":
            return encode_classes(self.clip_model, tokens, len(self.templates), progress=progress)
        state = self._text_state()
        cached = self._text_cache.get(mode)
        if cached is None or cached[0] != state:
            # The cached features must be usable by later calls in any mode.
            device = self.device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                features = self._encode_text(tokens, progress)
            cached = self._text_cache[mode] = (state, features)
        return cached[1]

    def _text_state(self) -> object:
        """A value that changes when kept text features are no longer valid."""
        return WeightsState(self.clip_model.text_parameters())

    def _encode_text(self, tokens: Sequence[Tensor], progress: Progress | None) -> Tensor:
        return encode_classes(self.clip_model, tokens, len(self.templates), progress=progress)

    def _class_mode(self) -> bool:
        """The mode whose class names are used: the present one, or the other if only that one has names."""
        if not self._classes:
            raise InputError("classes: none are set; call set_classes([...]) first")
        return self.training if self.training in self._classes else not self.training

    def encode_images(
        self, clip_images: Tensor, images: Tensor, clip: DenseCLIP | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return CLIP features and guidance maps.

        Args:
            clip_images: `[B, 3, H, W]`, normalised for CLIP, any size.
            images: the same pixels normalised for v1's backbone; v2 does not use them.
            clip: CLIP in another type; by default the model's own.

        Returns:
            Features `[B, 1 + h*w, C]`, the class token first, and guidance maps from coarse to fine.
        """
        clip = self.clip_model if clip is None else clip
        size = self.variant.clip.input_size
        clip_images = resize(clip_images, (size, size)).to(clip.visual.proj.dtype)
        if self.backbone is not None:
            features, _ = clip.encode_dense(clip_images)
            maps = self.backbone(resize(images, (CROP_SIZE, CROP_SIZE)).to(self.dtype))
            return features, (maps["res4"], maps["res3"], maps["res2"])
        features, maps = clip.encode_dense(clip_images, self.variant.guidance_layers)
        shallow, deep = (x.to(self.dtype) for x in maps)
        return features, (as_map(features), self.upsample1(shallow), self.upsample2(deep))

    def logits(self, clip_images: Tensor, images: Tensor) -> Tensor:
        """Return the logits `[B, T, 4h, 4w]` of the present classes; arguments as in `encode_images`."""
        features, guidance = self.encode_images(clip_images, images)
        text = self.text_features().to(features.dtype)
        return self.aggregator(as_map(features), text.expand(len(features), -1, -1, -1), guidance)

    def forward(
        self, batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Segment images, or compute the loss in training mode.

        Args:
            batched_inputs: one dict per image: "image" `[3, H, W]`, RGB, 0..255, any real type; "height" and
                "width" of the answer (by default the image's, or the sliding window's resolution); and
                "sem_seg" `[H, W]`, class indices, in training.

        Returns:
            One dict per image with "sem_seg", probabilities `[T, height, width]`, which do not depend on the
            other images. In training mode {"loss_sem_seg": scalar}.

        Raises:
            TypeError, ValueError: if an entry is wrong, or no classes are set; see `check_requests`.
        """
        check_requests(batched_inputs, self.size_divisibility if self.training else None)
        images = [entry["image"].to(self.device, torch.float32) for entry in batched_inputs]
        if self.training:
            return {"loss_sem_seg": self._loss(images, batched_inputs)}
        infer = self._infer_sliding if self.sliding_window else self._infer_whole
        return [{"sem_seg": infer(image, entry)} for image, entry in zip(images, batched_inputs, strict=True)]

    @torch.no_grad()
    def _infer_sliding(self, image: Tensor, entry: dict[str, Any]) -> Tensor:
        crops = self.window.crops(image)
        probabilities = self.window.merge(self.logits(*normalise(crops)).float())
        height, width = self.window.resolution
        size = (entry.get("height", height), entry.get("width", width))
        return resize(probabilities[None], size)[0]

    def _infer_whole(self, image: Tensor, entry: dict[str, Any]) -> Tensor:
        padded = [pad_to_multiple(x, self.size_divisibility)[None] for x in normalise(image)]
        probabilities = self.logits(*padded).float().sigmoid()
        height, width = image.shape[-2:]
        # Upstream cuts the 96x96 map, not the padded image, to the image's size: seen below 96 pixels only.
        probabilities = probabilities[..., :height, :width]
        return resize(probabilities, (entry.get("height", height), entry.get("width", width)))[0]

    def _loss(self, images: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        normalised = zip(*map(normalise, images), strict=True)
        clip_images, guidance_images = (
            pad_to_multiple(_stack_padded(batch), self.size_divisibility) for batch in normalised
        )
        classes = len(self._classes[self._class_mode()])
        labels = [
            class_indices(entry["sem_seg"], classes, self.ignore_label, f"batched_inputs[{index}]['sem_seg']")
            for index, entry in enumerate(batched_inputs)
        ]
        height, width = (max(x.shape[axis] for x in labels) for axis in (0, 1))
        labels = [
            F.pad(x, (0, width - x.shape[1], 0, height - x.shape[0]), value=self.ignore_label) for x in labels
        ]
        return self._criterion(self.logits(clip_images, guidance_images), torch.stack(labels))

    def _criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return segmentation_loss(logits, labels.to(logits.device), self.ignore_label)


def normalise(images: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise RGB `[…, 3, H, W]` in 0..255 for CLIP and for v1's backbones; return both."""
    clip_mean, clip_std = channels(CLIP_PIXEL_MEAN, images), channels(CLIP_PIXEL_STD, images)
    mean, std = channels(PIXEL_MEAN, images), channels(PIXEL_STD, images)
    return (images - clip_mean) / clip_std, (images - mean) / std


def channels(values: Sequence[float], like: Tensor) -> Tensor:
    """Return `[3, 1, 1]` in fp32 on a device, by filling: a CUDA graph records no copy from the host."""
    return torch.stack([like.new_full((1, 1), value, dtype=torch.float32) for value in values])


def as_map(features: Tensor) -> Tensor:
    """Return patch features `[B, C, h, w]` from dense CLIP features `[B, 1 + h*w, C]` of square images."""
    side = round((features.shape[1] - 1) ** 0.5)
    return rearrange(features[:, 1:], "B (h w) C -> B C h w", h=side)


def _stack_padded(images: Sequence[Tensor]) -> Tensor:
    """Stack images `[3, H, W]` into `[B, 3, H, W]`, zero-padded to the largest height and width."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    stacked = images[0].new_zeros(len(images), 3, height, width)
    for target, image in zip(stacked, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    return stacked
