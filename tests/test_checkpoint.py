"""Reading, recognising, loading and converting checkpoints, and errors for bad ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from catseg_fast.checkpoints.checkpoint import convert, load_into, read_checkpoint, recognise_variant
from catseg_fast.config import VARIANTS, CLIPConfig, ResNetConfig, SwinConfig, Variant
from catseg_fast.model import CATSeg
from catseg_fast.reference.guidance import ResNetGuidance, SwinGuidance
from support.accuracy import assert_same

OTHER = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor([1, 2])}  # not of a CAT-Seg model
AGGREGATOR = "sem_seg_head.predictor.transformer."
MASK = AGGREGATOR + "layers.0.swin_block.block_2.attn_mask"
TINY = Variant(
    name="custom-v2-vit64x2",
    version="v2",
    clip=CLIPConfig(
        embed_dim=24, image_size=64, input_size=384, patch_size=16, vision_width=64, vision_layers=2,
        vision_heads=1, text_width=64, text_heads=1, text_layers=2, vocab_size=30, context_length=11,
        vision_mlp_ratio=2.5,
    ),
    backbone=None, appearance_guidance_dim=24, prompt_ensemble="imagenet_select",
    decoder_guidance_dims=(20, 12), guidance_layers=(3, 7), hidden_dim=48, num_layers=1,
    text_guidance_proj_dim=16, appearance_guidance_proj_dim=8, decoder_dims=(32, 16),
    decoder_guidance_proj_dims=(6, 4),
)  # fmt: skip


def tiny_model(seed: int = 0, variant: Variant = TINY) -> CATSeg:
    torch.manual_seed(seed)
    model = CATSeg(variant)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    return model


@pytest.fixture
def tiny() -> dict[str, Tensor]:
    return tiny_model().state_dict()


# ---- recognising (published variants: test_state_dict.py) -------------------------------------------------


def test_a_custom_model_is_rebuilt_from_its_checkpoint(tiny: dict[str, Tensor]) -> None:
    assert recognise_variant(tiny) == TINY
    assert [*CATSeg(recognise_variant(tiny)).state_dict()] == [*tiny]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"pad_len": 0}, {"pad_len": 0}),
        ({"num_layers": 3}, {"num_layers": 3}),
        ({"window_size": 6, "feature_resolution": (12, 12)}, {"window_size": 6}),
        ({"prompt_ensemble": "imagenet"}, {"prompt_ensemble": "imagenet"}),
    ],
)
def test_each_dimension_shows(change: dict[str, Any], shown: dict[str, Any]) -> None:
    variant = replace(TINY, **change)
    found = recognise_variant(CATSeg(variant).state_dict())
    assert {name: getattr(found, name) for name in shown} == shown
    assert found.feature_resolution == variant.feature_resolution


@pytest.mark.parametrize(
    ("backbone", "config"),
    [
        (lambda: SwinGuidance(depths=(2, 2, 2)), SwinConfig(depths=(2, 2, 2))),
        (
            lambda: SwinGuidance(32, (1, 2, 3), (1, 2, 4), window_size=7),
            SwinConfig(32, (1, 2, 3), (1, 2, 4), window_size=7),
        ),
        (lambda: ResNetGuidance(50), ResNetConfig(50)),
    ],
)
def test_custom_backbones(backbone: Callable[[], nn.Module], config: SwinConfig | ResNetConfig) -> None:
    with torch.device("meta"):
        model = CATSeg("v1-vitl-swinb")
        model.backbone = backbone()
    found = recognise_variant(model.state_dict())
    expected = replace(VARIANTS["v1-vitl-swinb"], name="custom-v1-vit1024x24", backbone=config)
    assert found == expected


def renamed(prefix: str, new: str = "") -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {new + key.removeprefix(prefix): value for key, value in state.items() if prefix in key}

    return rename


@pytest.mark.parametrize(
    ("change", "family"),
    [
        (renamed("sem_seg_head.predictor.clip_model."), "OpenAI or open_clip CLIP"),
        (renamed(AGGREGATOR), "aggregator without CLIP"),
        (renamed(AGGREGATOR, AGGREGATOR), "incomplete CAT-Seg"),
        (lambda _: SwinGuidance(32, (1, 1, 1), (1, 1, 1)).state_dict(), "Swin Transformer"),
        (lambda _: {"layer1.0.conv1.weight": torch.zeros(2)}, "torchvision or timm ResNet"),
        (lambda _: {"vision_model.embeddings.class_embedding": torch.zeros(2)}, "Hugging Face transformers"),
        (lambda _: {"x": torch.zeros(2), "y": torch.zeros(2)}, r"nothing known \(2 tensors: x, y"),
        (lambda _: {}, "an empty state dict"),
    ],
)
def test_other_checkpoints_are_named(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], family: str, tiny: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=f"not a CAT-Seg checkpoint: it looks like .*{family}"):
        recognise_variant(change(tiny))


def test_damaged_cat_segs_are_named(tiny: dict[str, Tensor]) -> None:
    key = AGGREGATOR + "decoder1.up.weight"
    with pytest.raises(ValueError, match=f"incomplete CAT-Seg checkpoint: {key} is missing"):
        recognise_variant({name: value for name, value in tiny.items() if name != key})
    with pytest.raises(ValueError, match=rf"damaged CAT-Seg checkpoint: {key} has shape \(3,\)"):
        recognise_variant({**tiny, key: torch.zeros(3)})
    with pytest.raises(ValueError, match="13 image positions are not a square"):
        recognise_variant(
            {**tiny, "sem_seg_head.predictor.clip_model.visual.positional_embedding": torch.zeros(14, 64)}
        )
    with pytest.raises(ValueError, match=r"4 prompts per class; the prompt ensembles have .*80 \(imagenet\)"):
        recognise_variant({**tiny, AGGREGATOR + "conv1.weight": torch.zeros(48, 4, 7, 7)})


# ---- loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loads_any_float_type_into_the_models(dtype: torch.dtype, device: str) -> None:
    stored = {key: value.to(dtype) for key, value in tiny_model(seed=1).state_dict().items()}
    with torch.device(device):
        model = CATSeg(TINY)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    load_into(model, stored)
    assert_same(model.state_dict(), {key: value.float() for key, value in stored.items()})
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    next(iter(stored.values())).zero_()
    assert next(iter(model.state_dict().values())).any()  # a copy, not the checkpoint's memory


def test_derived_buffers_may_be_absent_extra_or_of_another_shape(tiny: dict[str, Tensor]) -> None:
    assert MASK in tiny
    extra = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "sem_seg_head.predictor.clip_model.vocab_size": torch.ones(()),
    }
    for masks in ({}, {MASK: torch.zeros(1, 4, 4)}):
        state = {key: value for key, value in tiny.items() if key != MASK}
        model = tiny_model(seed=1)
        load_into(model, {**state, **masks, **extra})
        assert_same(model.state_dict(), tiny)


def refuse(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Return the error of a checkpoint that does not fit; the model must stay as it is."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^model\.pth does not fit the model") as caught:
        load_into(model, state, "model.pth")
    assert_same(model.state_dict(), before)
    return str(caught.value)


def test_a_mismatch_is_explained_and_leaves_the_model(tiny: dict[str, Tensor]) -> None:
    model = tiny_model(seed=1)
    head = AGGREGATOR + "head.bias"
    state = {key: value for key, value in tiny.items() if key != head}
    state |= {"stranger": torch.zeros(2), "upsample1.bias": torch.zeros(7)}
    state["upsample2.bias"] = torch.zeros(12, dtype=torch.int8)
    message = refuse(model, state)
    assert f"1 missing from the file:\n    {head}\n" in message
    assert "1 not in the model:\n    stranger\n" in message
    assert "2 of another shape or type:" in message
    assert "upsample1.bias: expected (20,) float32, found (7,) float32" in message
    assert "upsample2.bias: expected (12,) float32, found (12,) int8" in message
    assert "the model is custom-v2-vit64x2" in message


@pytest.mark.parametrize("value", [torch.zeros(7), torch.zeros(20, dtype=torch.int8)], ids=["shape", "type"])
def test_one_wrong_tensor_is_enough(value: Tensor, tiny: dict[str, Tensor]) -> None:
    assert "1 of another shape or type:" in refuse(tiny_model(seed=1), {**tiny, "upsample1.bias": value})


def test_long_lists_are_cut() -> None:
    message = refuse(tiny_model(seed=1), {f"k{i}": torch.zeros(1) for i in range(30)})
    assert "30 not in the model" in message
    assert "… and 22 more" in message
    assert len(message.splitlines()) == 1 + 2 * (1 + 8 + 1)
    assert "The file looks like nothing known (30 tensors: k0, k1, k2, …); the model is" in message


def test_a_model_without_a_variant_is_described_too(tiny: dict[str, Tensor]) -> None:
    assert "nothing known" in refuse(nn.Linear(2, 2), tiny)


@pytest.mark.parametrize("masks", [True, False])
def test_from_pretrained(masks: bool, tiny: dict[str, Tensor], tmp_path: Path) -> None:
    stored = {key: value for key, value in tiny.items() if masks or key != MASK}
    torch.save({"model": stored}, tmp_path / "weights.pth")
    model = CATSeg.from_pretrained(tmp_path, device="cpu")
    assert model.variant == TINY
    assert not model.training
    assert_same(model.state_dict(), tiny)
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_from_pretrained_refuses_another_variant(tiny: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": tiny}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"weights\.pth .* looks like custom-v2-vit64x2; the model is v2-vitb"
    ):
        CATSeg.from_pretrained(tmp_path / "weights.pth", variant="v2-vitb")
    torch.save(OTHER, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: not a CAT-Seg checkpoint"):
        CATSeg.from_pretrained(tmp_path / "weights.pth")


# ---- converting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffixes", [(".pth", ".safetensors"), (".safetensors", ".pth"), (".pth", ".pt")])
def test_converts(suffixes: tuple[str, str], tiny: dict[str, Tensor], tmp_path: Path) -> None:
    source, target = (tmp_path / f"weights{suffix}" for suffix in suffixes)
    tiny["upsample1.bias"] = tiny["upsample1.bias"].half()
    save_file(tiny, source) if suffixes[0] == ".safetensors" else torch.save({"model": tiny}, source)
    assert convert(source, target) == target
    assert_same(read_checkpoint(target), tiny)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((source.name, target.name))
    if suffixes[1] == ".safetensors":
        with safetensors.safe_open(target, "pt") as file:
            assert file.metadata()["variant"] == "custom-v2-vit64x2"
            assert file.metadata()["catseg_fast"]
    else:
        assert torch.load(target, weights_only=True).keys() == {"model", "metadata"}


def test_converts_shared_and_strided_tensors(tiny: dict[str, Tensor], tmp_path: Path) -> None:
    joint = torch.randn(2, 20)
    tiny["upsample1.bias"] = joint[0]
    key = "sem_seg_head.predictor.clip_model.text_projection"
    tiny[key] = tiny[key].t().contiguous().t()
    bias = "sem_seg_head.predictor.clip_model.visual.ln_pre.bias"
    tiny[bias] = tiny["sem_seg_head.predictor.clip_model.visual.ln_post.bias"]
    torch.save({"model": tiny, "rest": joint}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), tiny)


@pytest.mark.parametrize("target", ["weights.pth", "link.pth", "weights.onnx", "none/out.pth", "folder.pth"])
def test_bad_targets(target: str, tiny: dict[str, Tensor], tmp_path: Path) -> None:
    source = tmp_path / "weights.pth"
    torch.save({"model": tiny}, source)
    content = source.read_bytes()
    (tmp_path / "link.pth").symlink_to(source)
    (tmp_path / "folder.pth").mkdir()
    names = {path.name for path in tmp_path.iterdir()}
    error = FileNotFoundError if "none" in target else ValueError
    with pytest.raises(error, match=r"^target: "):
        convert(source, tmp_path / target)
    assert source.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_failed_conversion_leaves_no_file(
    tiny: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"model": tiny}, source)
    target.write_bytes(b"earlier")

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, target)
    assert target.read_bytes() == b"earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"in.pth", "out.safetensors"}


def test_converts_only_cat_segs(tmp_path: Path) -> None:
    torch.save(OTHER, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"in\.pth: not a CAT-Seg checkpoint"):
        convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
