"""A stand-in for detectron2 and fvcore: what upstream's model imports from them, as documented."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from yacs.config import CfgNode as YacsNode


class CfgNode(YacsNode):
    """yacs's node, whose files may name another one as their `_BASE_`."""

    def merge_from_file(self, path: str | Path) -> None:
        content = yaml.safe_load(Path(path).read_text())
        if base := content.pop("_BASE_", None):
            self.merge_from_file(Path(path).parent / base)
        self.merge_from_other_cfg(CfgNode(content))


def get_cfg() -> CfgNode:
    """Return those of detectron2's defaults that the model or upstream's own keys use."""
    resnets = {
        "DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "STEM_OUT_CHANNELS": 64,
        "RES2_OUT_CHANNELS": 256, "STRIDE_IN_1X1": True, "NORM": "FrozenBN", "OUT_FEATURES": ["res4"],
    }  # fmt: skip
    model = {
        "META_ARCHITECTURE": "GeneralizedRCNN", "DEVICE": "cuda", "WEIGHTS": "",
        "PIXEL_MEAN": [103.53, 116.28, 123.675], "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2}, "RESNETS": resnets,
        "SEM_SEG_HEAD": {"NAME": "", "IN_FEATURES": [], "IGNORE_VALUE": 255, "NUM_CLASSES": 54},
    }  # fmt: skip
    sections: dict[str, Any] = {"INPUT": {"CROP": {}}, "DATASETS": {}, "SOLVER": {}, "TEST": {}}
    cfg = CfgNode({"MODEL": model, **sections})
    cfg.set_new_allowed(True)
    return cfg


def configurable(init: Callable[..., None]) -> Callable[..., None]:
    """Let a class be constructed from a configuration, by its `from_config`, or from explicit arguments."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(args[0] if args else kwargs.get("cfg"), CfgNode):
            init(self, **type(self).from_config(*args, **kwargs))
        else:
            init(self, *args, **kwargs)

    return wrapped


class Registry:
    """Classes by name."""

    def __init__(self) -> None:
        self.classes: dict[str, Any] = {}

    def register(self) -> Callable[[Any], Any]:
        def add(cls: Any) -> Any:
            assert cls.__name__ not in self.classes, f"{cls.__name__} is registered already"
            self.classes[cls.__name__] = cls
            return cls

        return add

    def get(self, name: str) -> Any:
        return self.classes[name]


@dataclass
class ShapeSpec:
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module):
    size_divisibility = 0


class ImageList:
    """Images stacked after padding to a multiple."""

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor, self.image_sizes = tensor, image_sizes

    @classmethod
    def from_tensors(cls, tensors: list[Tensor], size_divisibility: int = 0) -> ImageList:
        sizes = [(x.shape[-2], x.shape[-1]) for x in tensors]
        multiple = max(1, size_divisibility)
        height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
        padded = [F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in tensors]
        return cls(torch.stack(padded), sizes)


def sem_seg_postprocess(result: Tensor, image_size: tuple[int, int], height: int, width: int) -> Tensor:
    visible = result[:, : image_size[0], : image_size[1]][None]
    return F.interpolate(visible, size=(height, width), mode="bilinear", align_corners=False)[0]


def install(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Let `import detectron2` import the stand-in; return the registry of meta-architectures."""
    meta_archs, heads, backbones = Registry(), Registry(), Registry()

    def build_backbone(cfg: CfgNode) -> Any:
        return backbones.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3))

    def build_sem_seg_head(cfg: CfgNode, input_shape: Any) -> Any:
        return heads.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, input_shape)

    modules: dict[str, dict[str, Any]] = {
        "detectron2": {},
        "detectron2.config": {"CfgNode": CfgNode, "configurable": configurable, "get_cfg": get_cfg},
        "detectron2.data": {"MetadataCatalog": None},
        "detectron2.layers": {"Conv2d": nn.Conv2d, "ShapeSpec": ShapeSpec, "get_norm": None},
        "detectron2.modeling": {
            "BACKBONE_REGISTRY": backbones, "META_ARCH_REGISTRY": meta_archs, "SEM_SEG_HEADS_REGISTRY": heads,
            "Backbone": Backbone, "ShapeSpec": ShapeSpec, "build_backbone": build_backbone,
            "build_sem_seg_head": build_sem_seg_head,
        },
        "detectron2.modeling.backbone": {"Backbone": Backbone},
        "detectron2.modeling.postprocessing": {"sem_seg_postprocess": sem_seg_postprocess},
        "detectron2.structures": {"ImageList": ImageList},
        "detectron2.utils": {},
        "detectron2.utils.memory": {"_ignore_torch_cuda_oom": nullcontext},
        "fvcore": {},
        "fvcore.nn": {"weight_init": None},
        "fvcore.nn.weight_init": {},
    }  # fmt: skip
    for name, content in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return meta_archs
