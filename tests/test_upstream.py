"""`CATSegFast` against upstream's own code: `pytest -m upstream --upstream FOLDER`, a checkout of v1 or v2.

Configurations and model code are upstream's, CLIP is a small one with weights by rule; detectron2 is the
stand-in.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("yacs", reason="needs yacs, as detectron2's configurations do")

from catseg_fast.checkpoints import upstream_config
from catseg_fast.checkpoints.checkpoint import IGNORED_KEYS
from catseg_fast.config import CLIPConfig
from support.detectron2_double import CfgNode, get_cfg, install
from support.golden_rule import fill
from support.tiny import CLASSES, close, picture

pytestmark = pytest.mark.upstream

HEAD = "MODEL.SEM_SEG_HEAD."
CLIP = "sem_seg_head.predictor.clip_model."


@pytest.fixture
def upstream(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The checkout, whose package `cat_seg` can be imported without its data sets."""
    option = pytestconfig.getoption("--upstream")
    if option is None:
        pytest.skip("needs a checkout of upstream: --upstream FOLDER")
    folder = Path(option).resolve()
    package = ModuleType("cat_seg")
    package.__path__ = [str(folder / "cat_seg")]
    monkeypatch.setitem(sys.modules, "cat_seg", package)
    if not torch.cuda.is_available():
        monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    yield folder
    for name in [name for name in sys.modules if name.startswith(("cat_seg.", "catseg_fast.detectron2"))]:
        del sys.modules[name]


def small_clip(version: str) -> CLIPConfig:
    """Return a small CLIP; widths of towers and numbers of blocks are fixed in v2's code."""
    width, layers = (768, 9) if version == "v2" else (64, 2)
    return CLIPConfig(
        embed_dim=32, image_size=224, input_size=384, patch_size=16, vision_width=width, vision_layers=layers,
        vision_heads=width // 64, text_width=64, text_heads=1, text_layers=1,
    )  # fmt: skip


def upstreams_clip(config: CLIPConfig) -> nn.Module:
    from cat_seg.third_party.model_vpt import CLIP as UpstreamCLIP

    model = UpstreamCLIP(
        config.embed_dim, config.image_size, config.vision_layers, config.vision_width, config.patch_size,
        config.context_length, config.vocab_size, config.text_width, config.text_heads, config.text_layers,
    )  # fmt: skip
    fill(model, CLIP)
    return model.eval()


def read_cfg(folder: Path, version: str, *options: Any) -> CfgNode:
    """The configuration of ViT-B in v2, of Swin in v1, as `eval.sh` changes it, and smaller."""
    add_keys = importlib.import_module("cat_seg.config").add_cat_seg_config
    cfg = get_cfg()
    add_keys(cfg)
    cfg.merge_from_file(folder / "configs" / f"vit{'b' if version == 'v2' else 'l_swinb'}_384.yaml")
    small = [HEAD + "CLIP_PRETRAINED", "ViT-B/16", HEAD + "TEXT_GUIDANCE_DIM", 32]
    if version == "v2":
        small += [HEAD + "APPEARANCE_GUIDANCE_DIM", 32]
    else:
        small += ["MODEL.SWIN.EMBED_DIM", 32, "MODEL.SWIN.DEPTHS", [1, 1, 2]]
        small += ["MODEL.SWIN.NUM_HEADS", [1, 2, 4], HEAD + "APPEARANCE_GUIDANCE_DIM", 128]
        small += [HEAD + "DECODER_GUIDANCE_DIMS", [64, 32]]
    evaluation = [HEAD + "POOLING_SIZES", [1, 1], HEAD + "TEST_CLASS_JSON", "test.json"]
    cfg.merge_from_list([*small, *evaluation, HEAD + "TRAIN_CLASS_JSON", "test.json", *options])
    return cfg


@torch.no_grad()
@pytest.mark.parametrize("sliding_window", [True, False])
def test_the_answer_is_upstreams(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sliding_window: bool
) -> None:
    registry = install(monkeypatch)
    version = "v1" if (upstream / "configs" / "vitl_swinb_384.yaml").exists() else "v2"
    monkeypatch.chdir(tmp_path)
    Path("test.json").write_text(json.dumps(CLASSES[:3]))
    clip = small_clip(version)
    monkeypatch.setitem(upstream_config.CLIP_MODELS, "ViT-B/16", clip)
    clip_module = importlib.import_module("cat_seg.third_party.clip")
    monkeypatch.setattr(clip_module, "load", lambda *_, **__: (upstreams_clip(clip), None))
    for name in ("modeling", "cat_seg_model"):  # which register their content
        importlib.import_module(f"cat_seg.{name}")
    cfg = read_cfg(upstream, version, "TEST.SLIDING_WINDOW", sliding_window)
    theirs = registry.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    fill(theirs)
    theirs.eval()
    torch.save({"model": theirs.state_dict()}, "model_final.pth")

    importlib.import_module("catseg_fast.detectron2")  # the line that is added
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "CATSegFast"])
    ours = registry.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    keys = ours.load_state_dict(torch.load("model_final.pth")["model"], strict=False)
    assert not [key for key in keys.missing_keys + keys.unexpected_keys if not IGNORED_KEYS.search(key)]
    ours.eval()
    request = [{"image": picture(64, 96), "height": 70, "width": 90}]
    (expected,), (answer,) = theirs(request), ours(request)
    assert expected["sem_seg"].std() > 0.01
    assert close(answer["sem_seg"], expected["sem_seg"], 1e-4)
