"""A whole model on one picture, and each of its parts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import gate
from catseg_fast import CATSeg
from catseg_fast.backend import choose_backend
from catseg_fast.config import CROP_SIZE
from catseg_fast.inference.readout import LabelMap, Readout, reader
from catseg_fast.reference.inference import resize
from catseg_fast.reference.model import as_map, normalise

SIZE = (480, 640)
REFERENCE = "(a) reference, eager fp32"
GRAPH = "engine, all but cropping, CUDA graph"
WHOLE = (REFERENCE, "engine", GRAPH)
SPLIT = ("CLIP", "guidance", "aggregator", "post-processing")


@dataclass(frozen=True)
class Picture:
    """A picture as the parts of a model see it."""

    image: Tensor  # [3, H, W], RGB, 0..255
    clip_images: Tensor  # [B, 3, h, w], for CLIP
    images: Tensor  # [B, 3, h, w], for v1's backbone
    readout: Readout

    @classmethod
    def random(cls, model: CATSeg) -> Picture:
        """Return random numbers, the same every time."""
        image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1)).mul(255).to(model.device)
        if not model.sliding_window:
            return cls(image, *normalise(image[None]), Readout(SIZE, None, SIZE))
        return cls(image, *normalise(model.window.crops(image)), Readout(SIZE, model.window))

    @property
    def request(self) -> list[dict[str, Any]]:
        """Return the argument of a model's call."""
        return [{"image": self.image, "height": SIZE[0], "width": SIZE[1]}]


@dataclass(frozen=True)
class CheckedModel:
    """A model whose answer to a picture passed the gate."""

    model: CATSeg
    picture: Picture
    error_ratio: float


def make_model(
    variant: str, classes: int, device: torch.device, dtype: torch.dtype
) -> tuple[CATSeg, Picture]:
    """Return a picture, and a random model that aggregates all classes, with one crop on a CPU."""
    torch.manual_seed(0)
    names = [f"class {index}" for index in range(classes)]
    model = CATSeg(variant, names, sliding_window=device.type == "cuda", max_classes=None)
    model.engine.graphs = "off"
    model = model.to(device, dtype).eval()
    return model, Picture.random(model)


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def checked_model(variant: str, classes: int, device: torch.device, dtype: torch.dtype) -> CheckedModel:
    """Return a model whose probabilities were checked against the reference's in the same type."""
    model, picture = make_model(variant, classes, device, dtype)
    (ours,) = model(picture.request)
    model.backend = "reference"
    (eager,) = model(picture.request)
    precise = copy.deepcopy(model).to(gate.precise(dtype))
    (truth,) = precise(picture.request)
    model.backend = "auto"
    exact = truth["sem_seg"].to(gate.precise(dtype))
    return CheckedModel(model, picture, gate.check(ours["sem_seg"], eager["sem_seg"], exact))


@torch.no_grad()
def make_parts(model: CATSeg, picture: Picture) -> dict[str, Callable[[], Any]]:
    """Return the calls of the whole (`WHOLE`) and of each part (`SPLIT`) on the parts before it."""
    side, layers = model.variant.clip.input_size, model.variant.guidance_layers
    clip_images = resize(picture.clip_images, (side, side)).to(model.dtype)
    encode = functools.partial(model.clip_model.encode_dense, clip_images)
    if model.backbone is None:
        encode = functools.partial(encode, layers)
    features, guidance = model.encode_images(picture.clip_images, picture.images)
    intermediate = encode()[1]
    text, engine = model.text_features()[None], model.engine
    vocabulary = engine.vocabulary(text, model.max_classes)
    backend, target = choose_backend(model.backend, model.device), LabelMap(SIZE, model.device)
    logits = engine.logits(as_map(features), text.expand(len(features), -1, -1, -1), guidance, None)

    def stream(features: Tensor, guidance: Any, consume: Callable[[slice, Tensor], None]) -> None:
        engine.stream(as_map(features), vocabulary, guidance, model.max_classes, lambda: consume)

    def guide() -> Any:
        if model.backbone is None:
            shallow, deep = intermediate
            return model.upsample1(shallow), model.upsample2(deep)
        return model.backbone(resize(picture.images, (CROP_SIZE, CROP_SIZE)).to(model.dtype))

    def all_but_cropping() -> Tensor:
        encoded = model.encode_images(picture.clip_images, picture.images)
        stream(*encoded, reader(picture.readout, target, backend))
        return target.labels

    def reference() -> Tensor:
        model.backend = "reference"
        try:
            (answer,) = model(picture.request)
        finally:
            model.backend = "auto"
        labels: Tensor = answer["sem_seg"].argmax(dim=0)
        return labels

    return {
        REFERENCE: reference,
        "engine": lambda: model.label_map(picture.request),
        "CLIP": encode,
        "guidance": guide,
        "aggregator": lambda: stream(features, guidance, lambda *_: None),
        "post-processing": lambda: reader(picture.readout, target, backend)(
            slice(0, logits.shape[1]), logits
        ),
        GRAPH: all_but_cropping,
    }
