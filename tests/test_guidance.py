"""Guidance backbones against upstream's numbers, names and shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from catseg_fast.config import ResNetConfig, SwinConfig
from catseg_fast.reference.guidance import ResNetGuidance, SwinGuidance, build_guidance
from support.golden_rule import assert_output, check_sha_weights, fill, load_case, make_inputs

UPSTREAM_KEYS = Path(__file__).parent / "upstream_keys"
Build = Callable[[], SwinGuidance | ResNetGuidance]


def tiny_swin() -> SwinGuidance:
    return SwinGuidance(depths=(2, 2, 2))


def resnet50() -> ResNetGuidance:
    return ResNetGuidance(depth=50)


def upstream_shapes(variant: str, prefix: str = "backbone.") -> dict[str, tuple[int, ...]]:
    """Return names (with prefix) and shapes of one part of upstream's model."""
    shapes = {}
    for line in (UPSTREAM_KEYS / f"{variant}.txt").read_text().splitlines():
        name, shape = line.split()
        if name.startswith(prefix):
            shapes[name] = () if shape == "scalar" else tuple(map(int, shape.split("x")))
    return shapes


@pytest.mark.parametrize(
    ("name", "build"),
    [("part_swin_v1_tiny", tiny_swin), ("part_swin_v1_tiny_odd", tiny_swin), ("part_r50_v1", resnet50)],
)
def test_matches_upstream(name: str, build: Build) -> None:
    case = load_case(name)
    _, meta = case
    backbone = build().eval()
    fill(backbone, meta["prefix"], meta["seed"])
    check_sha_weights(backbone.state_dict(), meta)
    with torch.no_grad():
        outputs = backbone(make_inputs(meta)["image"])
    assert outputs.keys() == meta["outputs"].keys()
    for output, tensor in outputs.items():
        assert_output(case, output, tensor, factor=4, floor=2e-6)


@pytest.mark.parametrize(("name", "variant"), [("swin-b", "v1-vitl-swinb"), ("resnet-101", "v1-vitb-r101")])
def test_names_and_shapes_are_upstreams(name: str, variant: str) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": build_guidance(name)})
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == upstream_shapes(variant)


@pytest.mark.parametrize(
    ("config", "build"), [(SwinConfig(depths=(2, 2, 2)), tiny_swin), (ResNetConfig(50), resnet50)]
)
def test_builds_from_a_configuration(config: SwinConfig | ResNetConfig, build: Build) -> None:
    with torch.device("meta"):
        built, expected = build_guidance(config).state_dict(), build().state_dict()
    assert {key: value.shape for key, value in built.items()} == {
        key: value.shape for key, value in expected.items()
    }


@pytest.mark.parametrize("build", [tiny_swin, resnet50])
def test_state_dict_round_trip(build: Build) -> None:
    source, target = nn.ModuleDict({"backbone": build()}), nn.ModuleDict({"backbone": build()})
    fill(source)
    saved = source.state_dict()
    names = list(saved)
    target.load_state_dict(saved, strict=True)
    copy.deepcopy(target).load_state_dict(saved, strict=True)
    assert list(saved) == names, "loading must not rename the caller's entries"
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    for name, tensor in target["backbone"].state_dict().items():
        assert torch.equal(tensor, saved[f"backbone.{name}"]), name


@pytest.mark.parametrize("build", [tiny_swin, resnet50])
def test_strict_loading_reports_a_missing_and_an_unknown_entry(build: Build) -> None:
    backbone = build()
    state = backbone.state_dict()
    state["layers.9.weight"] = state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key.*layers\.9\.weight"):
        backbone.load_state_dict(state, strict=True)


@pytest.mark.parametrize("build", [tiny_swin, resnet50])
@pytest.mark.parametrize(("H", "W"), [(33, 50), (31, 97), (96, 64)])
def test_output_shapes_round_up(build: Build, H: int, W: int) -> None:
    backbone = build().eval()
    with torch.no_grad():
        outputs = backbone(torch.zeros(2, 3, H, W))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        name: (2, channels, -(-H // stride), -(-W // stride))
        for (name, channels), stride in zip(backbone.channels.items(), (4, 8, 16), strict=True)
    }


def test_frozen_batch_norm_is_never_updated() -> None:
    backbone = resnet50().train()
    fill(backbone, "backbone.")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    trained = backbone(image)["res4"]
    trained.mean().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert torch.equal(trained, backbone.eval()(image)["res4"])
    assert not any("norm" in name or "bn" in name for name, _ in backbone.named_parameters())


def test_drop_path_is_active_in_training_only() -> None:
    backbone = tiny_swin().train()
    fill(backbone, "backbone.")
    image = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    rates = [block.drop_path1.drop_prob for stage in backbone.layers for block in stage.blocks[-1:]]
    assert rates == pytest.approx([0.06, 0.18, 0.3])
    with torch.no_grad():
        assert torch.equal(backbone.eval()(image)["res4"], backbone(image)["res4"])
        torch.manual_seed(0)
        assert not torch.equal(backbone.train()(image)["res4"], backbone(image)["res4"])


def test_unknown_backbones_are_named() -> None:
    with pytest.raises(ValueError, match="'vgg'; valid names: swin-b, resnet-101"):
        build_guidance("vgg")
    with pytest.raises(ValueError, match="depth 18 is not one of 50, 101"):
        ResNetGuidance(depth=18)
    with pytest.raises(ValueError, match="need 3 entries"):
        SwinGuidance(depths=(2, 2, 2, 2))
