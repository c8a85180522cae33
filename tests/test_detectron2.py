"""`CATSegFast` in a stand-in for detectron2; `test_upstream.py` runs upstream's own code."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("yacs", reason="needs yacs, as detectron2's configurations do")

from catseg_fast import VARIANTS
from catseg_fast.checkpoints import upstream_config
from catseg_fast.checkpoints.upstream_config import model_arguments
from catseg_fast.config import ResNetConfig, SwinConfig
from support.detectron2_double import CfgNode, Registry, get_cfg, install
from support.tiny import CLASSES, V1, V2, close, picture, sem_seg, tiny_model

TRAIN_CLASSES = ("cat", "dog")
HEAD = "MODEL.SEM_SEG_HEAD."
V2_VITL: dict[str, Any] = {
    "META_ARCHITECTURE": "CATSegFast",
    "PIXEL_MEAN": [123.675, 116.280, 103.530],
    "PIXEL_STD": [58.395, 57.120, 57.375],
    "CLIP_PIXEL_MEAN": [122.7709383, 116.7460125, 104.09373615],
    "CLIP_PIXEL_STD": [68.5005327, 66.6321579, 70.3231630],
    "PROMPT_ENSEMBLE_TYPE": "single",
    "MASK_FORMER": {"SIZE_DIVISIBILITY": 32},
    "SEM_SEG_HEAD": {
        "CLIP_PRETRAINED": "ViT-L/14@336px", "CLIP_FINETUNE": "attention",
        "PROMPT_DEPTH": 0, "PROMPT_LENGTH": 0,
        "TEXT_GUIDANCE_DIM": 768, "TEXT_GUIDANCE_PROJ_DIM": 128, "APPEARANCE_GUIDANCE_DIM": 768,
        "APPEARANCE_GUIDANCE_PROJ_DIM": 128, "DECODER_DIMS": [64, 32], "DECODER_GUIDANCE_DIMS": [256, 128],
        "DECODER_GUIDANCE_PROJ_DIMS": [32, 16], "NUM_LAYERS": 2, "NUM_HEADS": 4, "HIDDEN_DIMS": 128,
        "POOLING_SIZES": [1, 1], "FEATURE_RESOLUTION": [24, 24], "WINDOW_SIZES": 12,
        "ATTENTION_TYPE": "linear",
    },
}  # fmt: skip
SWIN = {
    "EMBED_DIM": 128, "DEPTHS": [2, 2, 18], "NUM_HEADS": [4, 8, 16], "WINDOW_SIZE": 12, "PATCH_SIZE": 4,
    "MLP_RATIO": 4.0, "QKV_BIAS": True, "QK_SCALE": None, "DROP_RATE": 0.0, "ATTN_DROP_RATE": 0.0,
    "DROP_PATH_RATE": 0.3, "APE": False, "PATCH_NORM": True,
}  # fmt: skip
V1_SWIN: dict[str, Any] = {
    "BACKBONE": {"NAME": "D2SwinTransformer"},
    "SWIN": SWIN,
    "PROMPT_ENSEMBLE_TYPE": "imagenet",
    "SEM_SEG_HEAD": {"APPEARANCE_GUIDANCE_DIM": 512},
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "v2-vitl": {},
    "v2-vitb": {
        "SEM_SEG_HEAD": {
            "CLIP_PRETRAINED": "ViT-B/16",
            "TEXT_GUIDANCE_DIM": 512,
            "APPEARANCE_GUIDANCE_DIM": 512,
        }
    },
    "v1-vitl-swinb": V1_SWIN,
    "v1-vith-swinb": {**V1_SWIN, "SEM_SEG_HEAD": {
        "CLIP_PRETRAINED": "ViT-H", "TEXT_GUIDANCE_DIM": 1024, "APPEARANCE_GUIDANCE_DIM": 512,
    }},
    "v1-vitb-r101": {
        "RESNETS": {"DEPTH": 101, "STRIDE_IN_1X1": False},
        "PROMPT_ENSEMBLE_TYPE": "imagenet",
        "SEM_SEG_HEAD": {
            "CLIP_PRETRAINED": "ViT-B/16", "TEXT_GUIDANCE_DIM": 512, "APPEARANCE_GUIDANCE_DIM": 1024,
            "DECODER_GUIDANCE_DIMS": [512, 256],
        },
    },
}  # fmt: skip


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """v2-vitl's configuration as upstream evaluates it, with class lists in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, classes in (("train", TRAIN_CLASSES), ("test", CLASSES)):
        Path(f"{name}.json").write_text(json.dumps(classes))
    return make_cfg("v2-vitl")


def make_cfg(name: str, *options: Any) -> CfgNode:
    cfg = get_cfg()
    lists = {"SEM_SEG_HEAD": {"TRAIN_CLASS_JSON": "train.json", "TEST_CLASS_JSON": "test.json"}}
    for part in (V2_VITL, lists, CONFIGURATIONS[name]):
        cfg.merge_from_other_cfg(CfgNode({"MODEL": part}))
    cfg.merge_from_other_cfg(
        CfgNode({"TEST": {"SLIDING_WINDOW": True}, "SOLVER": {"BACKBONE_MULTIPLIER": 0.0}})
    )
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_published_configurations_are_the_published_variants(cfg: CfgNode, name: str) -> None:
    assert model_arguments(make_cfg(name)) == {
        "variant": VARIANTS[name],
        "classes": CLASSES,
        "train_classes": TRAIN_CLASSES,
        "sliding_window": True,
        "size_divisibility": 32,
        "clip_finetune": "attention",
        "train_backbone": False,
    }


def test_every_key_counts(cfg: CfgNode) -> None:
    cfg.merge_from_list([
        HEAD + "POOLING_SIZES", [2, 2], HEAD + "NUM_LAYERS", 3, HEAD + "NUM_HEADS", 8,
        HEAD + "HIDDEN_DIMS", 64,
        HEAD + "WINDOW_SIZES", 6, HEAD + "ATTENTION_TYPE", "full", HEAD + "TEXT_GUIDANCE_PROJ_DIM", 32,
        HEAD + "APPEARANCE_GUIDANCE_PROJ_DIM", 48, HEAD + "DECODER_DIMS", [48, 24],
        HEAD + "DECODER_GUIDANCE_PROJ_DIMS", [8, 4], "MODEL.PROMPT_ENSEMBLE_TYPE", "imagenet_select",
        "TEST.SLIDING_WINDOW", False, "SOLVER.BACKBONE_MULTIPLIER", 0.1, HEAD + "CLIP_FINETUNE", "nothing",
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 0,
    ])  # fmt: skip
    arguments = model_arguments(cfg)
    assert arguments["variant"] == replace(
        VARIANTS["v2-vitl"], name="configured-v2", pooling_size=(2, 2), num_layers=3, nheads=8, hidden_dim=64,
        window_size=6, attention_type="full", text_guidance_proj_dim=32, appearance_guidance_proj_dim=48,
        decoder_dims=(48, 24), decoder_guidance_proj_dims=(8, 4), prompt_ensemble="imagenet_select",
    )  # fmt: skip
    assert arguments["sliding_window"] is False
    assert arguments["train_backbone"] is True
    assert arguments["clip_finetune"] == "none"
    assert arguments["size_divisibility"] == 1


def test_backbones_of_other_sizes(cfg: CfgNode) -> None:
    dims = [HEAD + "APPEARANCE_GUIDANCE_DIM", 128, HEAD + "DECODER_GUIDANCE_DIMS", [64, 32]]
    swin = make_cfg(
        "v1-vitl-swinb", "MODEL.SWIN.EMBED_DIM", 32, "MODEL.SWIN.DEPTHS", [1, 1, 2], "MODEL.SWIN.NUM_HEADS",
        [1, 2, 4], "MODEL.SWIN.WINDOW_SIZE", 6, *dims, "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", -1,
    )  # fmt: skip
    arguments = model_arguments(swin)
    assert arguments["variant"].backbone == SwinConfig(32, (1, 1, 2), (1, 2, 4), 6, 4)
    assert arguments["size_divisibility"] == 32
    resnet = make_cfg("v1-vitb-r101", "MODEL.RESNETS.DEPTH", 50, "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", -1)
    arguments = model_arguments(resnet)
    assert arguments["variant"].backbone == ResNetConfig(50)
    assert arguments["size_divisibility"] == 1


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("v2-vitl", "MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]),
        ("v2-vitl", "MODEL.CLIP_PIXEL_STD", [1.0, 1.0, 1.0]),
        ("v2-vitl", "MODEL.PROMPT_ENSEMBLE_TYPE", "own"),
        ("v2-vitl", "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", -1),
        ("v2-vitl", HEAD + "IGNORE_VALUE", 0),
        ("v2-vitl", HEAD + "PROMPT_DEPTH", 3),
        ("v2-vitl", HEAD + "CLIP_PRETRAINED", "RN50"),
        ("v2-vitl", HEAD + "TEXT_GUIDANCE_DIM", 0),
        ("v2-vitl", HEAD + "APPEARANCE_GUIDANCE_DIM", 64),
        ("v2-vitl", HEAD + "FEATURE_RESOLUTION", [12, 12]),
        ("v2-vitl", HEAD + "ATTENTION_TYPE", "none"),
        ("v2-vitl", HEAD + "TEST_CLASS_JSON", "nowhere.json"),
        ("v1-vitl-swinb", "MODEL.SWIN.DEPTHS", [2, 2, 18, 2]),
        ("v1-vitl-swinb", "MODEL.SWIN.APE", True),
        ("v1-vitl-swinb", "MODEL.BACKBONE.NAME", "build_vit"),
        ("v1-vitl-swinb", HEAD + "APPEARANCE_GUIDANCE_DIM", 64),
        ("v1-vitb-r101", "MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("v1-vitb-r101", "MODEL.RESNETS.DEPTH", 18),
    ],
)
def test_what_is_not_served_is_named(cfg: CfgNode, name: str, key: str, value: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{key}\\b"):
        model_arguments(make_cfg(name, key, value))


def test_v2_has_no_guidance_of_a_large_clip(cfg: CfgNode) -> None:
    dims = [HEAD + "TEXT_GUIDANCE_DIM", 1024, HEAD + "APPEARANCE_GUIDANCE_DIM", 1024]
    with pytest.raises(ValueError, match=f"^{HEAD}CLIP_PRETRAINED: 'ViT-H'"):
        model_arguments(make_cfg("v2-vitl", HEAD + "CLIP_PRETRAINED", "ViT-H", *dims))


@pytest.mark.parametrize("content", ["[]", '["a", "a"]', '["a", 1]', "{}", "["])
def test_a_bad_class_list_is_named(cfg: CfgNode, content: str) -> None:
    Path("test.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{HEAD}TEST_CLASS_JSON: "):
        model_arguments(cfg)


def test_a_configuration_without_upstreams_keys(cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match=r"^MODEL.PIXEL_MEAN: .* is not "):
        model_arguments(get_cfg())
    del cfg.MODEL["MASK_FORMER"]
    with pytest.raises(ValueError, match=r"^MODEL.MASK_FORMER.SIZE_DIVISIBILITY: .* add_cat_seg_config"):
        model_arguments(cfg)


def test_any_object_of_this_structure_will_do(cfg: CfgNode) -> None:
    def plain(value: Any) -> Any:
        return (
            SimpleNamespace(**{k: plain(v) for k, v in value.items()}) if isinstance(value, dict) else value
        )

    assert model_arguments(plain(cfg)) == model_arguments(cfg)


def fresh_module() -> ModuleType:
    sys.modules.pop("catseg_fast.detectron2", None)
    return importlib.import_module("catseg_fast.detectron2")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A detectron2 with `CATSegFast`, in which ViT-B/16 is a tiny model."""
    yield_to = install(monkeypatch)
    monkeypatch.setitem(upstream_config.CLIP_MODELS, "ViT-B/16", V2.clip)
    monkeypatch.setitem(upstream_config.GUIDANCE_LAYERS, "ViT-B/16", V2.guidance_layers)
    monkeypatch.setattr(upstream_config, "CLIP_GUIDANCE_DIMS", V2.decoder_guidance_dims)
    fresh_module()
    yield yield_to
    sys.modules.pop("catseg_fast.detectron2", None)


def tiny_options() -> list[Any]:
    sizes = {
        "TEXT_GUIDANCE_DIM": 32, "APPEARANCE_GUIDANCE_DIM": 32, "DECODER_GUIDANCE_DIMS": [24, 16],
        "HIDDEN_DIMS": 32, "TEXT_GUIDANCE_PROJ_DIM": 16, "APPEARANCE_GUIDANCE_PROJ_DIM": 16,
        "DECODER_DIMS": [32, 16], "DECODER_GUIDANCE_PROJ_DIMS": [8, 4],
    }  # fmt: skip
    return [item for key, value in sizes.items() for item in (HEAD + key, value)]


@pytest.mark.parametrize("sliding_window", [True, False])
def test_it_is_built_loaded_and_called_as_detectron2_does(
    cfg: CfgNode, registry: Registry, sliding_window: bool
) -> None:
    cfg = make_cfg("v2-vitb", *tiny_options(), "TEST.SLIDING_WINDOW", sliding_window)
    expected = tiny_model(variant=replace(V2, pad_len=256), sliding_window=sliding_window)
    model = registry.get(cfg.MODEL.META_ARCHITECTURE)(cfg).to(torch.device("cpu"))
    request = [{"image": picture(50, 70), "height": 50, "width": 70}]
    with pytest.raises(RuntimeError, match=r"MODEL\.WEIGHTS: no checkpoint was loaded"):
        model(request)
    model.load_state_dict({**expected.state_dict(), "pixel_mean": torch.zeros(3, 1, 1)}, strict=False)
    model.eval()
    assert model.classes == CLASSES
    (result,) = model(request)
    assert close(result["sem_seg"], sem_seg(expected, picture(50, 70), height=50, width=70), 1e-6)
    model.train()
    assert model.classes == TRAIN_CLASSES


def test_weights_that_a_checkpoint_lacks_are_named(cfg: CfgNode, registry: Registry) -> None:
    model = registry.get("CATSegFast")(make_cfg("v2-vitb", *tiny_options())).eval()
    weights = model.state_dict()
    half = {key: value for key, value in weights.items() if "clip_model" not in key}
    model.load_state_dict(half, strict=False)
    with pytest.raises(
        RuntimeError, match=r"MODEL.WEIGHTS: \d+ weights .* sem_seg_head.predictor.clip_model"
    ):
        model([{"image": picture(32, 32)}])
    rest = {key: value for key, value in weights.items() if key not in half}
    model.load_state_dict(rest, strict=False)
    assert model([{"image": picture(32, 32)}])[0]["sem_seg"].shape == (5, 640, 640)


def test_explicit_arguments_are_catsegs(registry: Registry) -> None:
    model = registry.get("CATSegFast")(V1, CLASSES, sliding_window=False)
    assert model.variant == V1
    assert model.classes == CLASSES


def test_without_detectron2_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ImportError, match=r"detectron2 cannot be imported .* needs no detectron2"):
        fresh_module()
