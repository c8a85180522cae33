"""The model as a graph that runs elsewhere: `torch.export`, and ONNX.

    images [B, 3, 384, 384], RGB in 0..255;  text features [T, P, F]  ->  logits [B, T, 96, 96]

The vocabulary is an input of any size T: its text features are `CATSeg.text_features()`. What follows from
weights alone is folded before. All classes are aggregated, as with `max_classes = None`.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from catseg_fast._version import __version__
from catseg_fast.config import CROP_SIZE
from catseg_fast.engine import torch_stages as stages
from catseg_fast.engine.folding import Plan, build_plan, map_tensors
from catseg_fast.engine.schedule import Schedule
from catseg_fast.engine.streaming import Stream
from catseg_fast.engine.terms import image_terms, vocabulary_terms
from catseg_fast.errors import InputError
from catseg_fast.export.target import FORMAT, check_target
from catseg_fast.files import exclusive, temporary_folder
from catseg_fast.numeric import whole
from catseg_fast.reference.model import CATSegHead, CATSegPredictor, as_map, normalise

if TYPE_CHECKING:
    from catseg_fast.model import CATSeg

INPUTS, OUTPUT = ("images", "text_features"), "logits"
OPSET = 18
PROJECTIONS = ("guidance_projection", "text_guidance_projection", "decoder_guidance_projection")


class FoldedModel(nn.Module):
    """Images and text features to logits, with the aggregator's weights folded and no text tower."""

    def __init__(self, model: CATSeg) -> None:
        super().__init__()
        with torch.no_grad():
            self._plan: Plan = build_plan(model.aggregator, model.dtype)
            map_tensors(self._add_buffer, self._plan)
        # Of the aggregator the modules that are not folded, and the one that tells device and type.
        self.aggregator = _without(model.aggregator, keep=(*PROJECTIONS, "conv1"))
        self.encoder = _without(model, keep=("backbone", "upsample1", "upsample2"))
        clip = _without(model.clip_model, keep=("visual",))
        self.encoder.register_module("sem_seg_head", CATSegHead(CATSegPredictor(clip, self.aggregator)))

    def _add_buffer(self, tensor: Tensor) -> Tensor:
        self.register_buffer(f"plan_{sum(1 for _ in self.buffers(recurse=False))}", tensor)
        return tensor

    def forward(self, images: Tensor, text_features: Tensor) -> Tensor:
        """Logits `[B, T, 4h, 4w]` of `images [B, 3, H, W]` and `text_features [T, P, F]`."""
        buffers: Iterator[Tensor] = self.buffers(recurse=False)
        plan: Plan = map_tensors(lambda _: next(buffers), self._plan)
        features, guidance = self.encoder.encode_images(*normalise(images.float()))
        image = image_terms(self.aggregator, plan, as_map(features), guidance)
        vocabulary = vocabulary_terms(self.aggregator, plan, text_features[None], normalise_prompts=False)
        schedule = Schedule("resident", vocabulary.classes, "one step", 0, 0, 0)
        answers: list[Tensor] = []
        Stream(stages, plan, image, vocabulary, None, schedule).run(lambda _, logits: answers.append(logits))
        return answers[0]


def _without(module: Any, keep: tuple[str, ...]) -> Any:
    """A shallow copy that shares the kept submodules and has no other, and no parameters of its own."""
    module = copy.copy(module)
    module._modules = {name: part for name, part in module._modules.items() if name in keep}
    module._parameters, module._buffers = {}, {}
    return module


@torch.no_grad()
def export_program(
    model: CATSeg, *, crops: int = 1, size: int = CROP_SIZE, most_classes: int = 2**16
) -> torch.export.ExportedProgram:
    """The model on the torch back end as a `torch.export` program.

    Args:
        model: in evaluation mode.
        crops: images B of a call; that is fixed.
        size: side of the images; that is fixed, too.
        most_classes: the largest vocabulary T; any from 1 may come.

    Raises:
        InputError: if the model is in training mode, or an argument is not positive.
    """
    if model.training:
        raise InputError("model: is in training mode; call model.eval() first")
    for name, value in (("crops", crops), ("size", size), ("most_classes", most_classes)):
        whole(value, name)
    width, prompts = model.variant.clip.embed_dim, len(model.templates)
    images = torch.zeros(crops, 3, size, size, device=model.device)
    text = torch.ones(3, prompts, width, device=model.device, dtype=model.dtype)
    classes = torch.export.Dim("classes", min=1, max=most_classes)
    return torch.export.export(
        FoldedModel(model).eval(),
        (images, text),
        dynamic_shapes={"images": None, "text_features": {0: classes}},
        strict=False,
    )


def export_onnx(
    model: CATSeg,
    path: str | os.PathLike[str],
    *,
    crops: int = 1,
    begin: Callable[[str], object] = lambda stage: None,
) -> list[Path]:
    """Write the model as ONNX, with the files that are needed to use it; all of them, or nothing.

    Args:
        model: in evaluation mode, in fp32; its classes become the vocabulary that comes with it.
        path: the .onnx file. Next to it are NAME.json, which describes inputs, outputs and the next steps,
            NAME.classes.npz with the classes' names and text features, and, if the weights are near 2 GB,
            NAME.onnx.data.
        crops: images B of a call.
        begin: called with the name of each stage at its start.

    Returns:
        The files, the .onnx first.

    Raises:
        FileNotFoundError, ValueError: if the path has no folder or another suffix, or the model is not in
            evaluation mode and fp32.
        FileExistsError: if a file beside the .onnx would be replaced that is not of an earlier export.
        ImportError: if onnx or onnxscript is missing (`pip install "catseg-fast[export]"`).
    """
    path = check_target(path)
    if model.dtype != torch.float32:
        raise InputError(f"model: is in {model.dtype}; ONNX is written in torch.float32")
    begin("Encoding the class names")
    text = model.text_features().cpu().numpy()  # fails first where there are no classes
    begin("Tracing the model")
    program = export_program(model, crops=crops)
    begin("Translating it to ONNX")
    with _quiet():
        written = torch.onnx.export(
            program, dynamo=True, input_names=INPUTS, output_names=(OUTPUT,), opset_version=OPSET,
            verbose=False, dynamic_shapes={"images": None, "text_features": {0: "classes"}},
        )  # fmt: skip
    assert written is not None
    begin("Writing")
    with temporary_folder(path.parent) as folder:
        written.save(folder / path.name, external_data=_weight_bytes(program) > 1.8e9)
        np.savez(folder / f"{path.stem}.classes.npz", classes=np.array(model.classes), text_features=text)
        card = json.dumps(describe(model, path, crops), indent=2, ensure_ascii=False) + "\n"
        (folder / f"{path.stem}.json").write_text(card, encoding="utf-8", errors="backslashreplace")
        # The card tells whose files these are. The model vouches for them: it is removed first, written last.
        order = {f"{path.stem}.json": 0, path.name: 2}
        names = sorted((file.name for file in folder.iterdir()), key=lambda name: order.get(name, 1))
        with exclusive(path.parent):
            path.unlink(missing_ok=True)
            for name in names:
                os.replace(folder / name, path.with_name(name))
    return [path.with_name(name) for name in reversed(names)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the exporter's libraries log errors only, not each optimisation that they leave out."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _weight_bytes(program: torch.export.ExportedProgram) -> int:
    return sum(tensor.nbytes for tensor in (*program.state_dict.values(), *program.constants.values()))


def describe(model: CATSeg, path: Path, crops: int) -> dict[str, Any]:
    """Describe the ONNX file for programs without this package."""
    window, side = model.window, 4 * model.variant.feature_resolution[0]
    text = f"[classes, {len(model.templates)}, {model.variant.clip.embed_dim}]"
    return {
        "format": f"{FORMAT} 1",
        "catseg_fast": __version__,
        "variant": model.variant.name,
        "model": path.name,
        "vocabulary": f"{path.stem}.classes.npz",
        "inputs": {
            "images": {
                "shape": [crops, 3, CROP_SIZE, CROP_SIZE],
                "type": "float32",
                "pixels": "RGB, 0 to 255; mean and deviation are applied inside the model",
            },
            "text_features": {
                "shape": text,
                "type": "float32",
                "source": "text_features in the vocabulary's file; any number of classes",
            },
        },
        "outputs": {"logits": {"shape": f"[{crops}, classes, {side}, {side}]", "type": "float32"}},
        "whole_image": [
            f"resize the picture to {CROP_SIZE}x{CROP_SIZE}, bilinear, half-pixel centres, no antialiasing",
            "run the model; probabilities are the sigmoid of the logits, each class for itself",
            "resize the probabilities to the picture's size likewise; the label is their argmax over classes",
        ],
        "sliding_window": {
            "resolution": list(window.resolution),
            "crop_size": window.crop_size,
            "corners": [list(corner) for corner in window.corners()],
            "steps": [
                "resize the picture to the resolution; cut crops of crop_size at the corners (top, left)",
                "one more crop is the whole picture, resized to crop_size",
                "logits of each crop, resized to crop_size, then the sigmoid",
                "average the crops where they overlap, then with the last crop resized to the resolution",
                "resize to the picture's size; the label is the argmax over classes",
            ],
        },
    }
