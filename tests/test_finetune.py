"""Upstream's trained parameters and its loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catseg_fast import CATSeg
from catseg_fast.config import Version
from catseg_fast.reference.finetune import is_trained, segmentation_loss
from support.tiny import CLASSES, picture, tiny_model

VERSIONS: tuple[Version, ...] = ("v1", "v2")
versions = pytest.mark.parametrize("version", VERSIONS)

# The tiny CLIP: three blocks for images, two for text, with the names of upstream's CLIP.
IMAGE_BLOCKS = [f"visual.transformer.resblocks.{i}" for i in range(3)]
TEXT_BLOCKS = [f"transformer.resblocks.{i}" for i in range(2)]
JOINT = ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"]
SPLIT = ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", *JOINT[1:]]
OTHERS = [
    *(f"ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    *(f"mlp.{layer}.{kind}" for layer in ("c_fc", "c_proj") for kind in ("weight", "bias")),
]
STEM = [
    "visual.class_embedding", "visual.positional_embedding", "visual.proj", "visual.conv1.weight",
    "visual.ln_pre.weight", "visual.ln_pre.bias", "visual.ln_post.weight", "visual.ln_post.bias",
]  # fmt: skip


def names(blocks: list[str], parts: list[str]) -> set[str]:
    return {f"{block}.{part}" for block in blocks for part in parts}


TRAINED: dict[tuple[str, str], set[str]] = {
    ("v1", "attention"): names(IMAGE_BLOCKS, JOINT) | {"visual.positional_embedding"},
    ("v1", "full"): names(IMAGE_BLOCKS, JOINT + OTHERS) | set(STEM),
    ("v2", "attention"): names(IMAGE_BLOCKS + TEXT_BLOCKS, ["attn.q_proj_weight", "attn.v_proj_weight"]),
    ("v2", "full"): names(IMAGE_BLOCKS + TEXT_BLOCKS, SPLIT + OTHERS),
    ("v1", "prompt"): set(),
    ("v2", "prompt"): set(),
    ("v1", "none"): set(),
    ("v2", "none"): set(),
}


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("version", "rule"), TRAINED)
def test_what_of_clip_is_trained(version: Any, rule: str) -> None:
    model = tiny_model(version, clip_finetune=rule)
    assert trained(model.clip_model) == TRAINED[version, rule]
    outside = {name for name, _ in model.named_parameters() if ".clip_model." not in name}
    expected = {name for name in outside if not name.startswith("backbone.")}
    assert {name for name in trained(model) if ".clip_model." not in name} == expected


def test_prompt_tokens_are_trained_where_there_are_some() -> None:
    assert is_trained("visual.transformer.prompt_tokens", "prompt", "v1")
    assert is_trained("visual.transformer.prompt_tokens", "prompt", "v2")
    assert not is_trained("visual.transformer.prompt_tokens", "attention", "v2")


def test_the_backbone_is_trained_but_for_its_first_norm() -> None:
    backbone = tiny_model("v1", train_backbone=True).backbone
    assert backbone is not None
    every = {name for name, _ in backbone.named_parameters()}
    assert every - trained(backbone) == {"norm0.weight", "norm0.bias"}


def test_unknown_rules() -> None:
    with pytest.raises(ValueError, match="clip_finetune: 'qkv' is not one of attention, full, prompt, none"):
        tiny_model(clip_finetune="qkv")


def slow_loss(logits: Tensor, labels: Tensor, ignore: int) -> float:
    """Return the mean of -log p (pixel's class) and -log(1 - p) (others), pixel by pixel."""
    total = 0.0
    for b, y, x in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        for t in range(logits.shape[1]):
            positive = labels[b, y, x] == t and labels[b, y, x] != ignore
            value = logits[b, t, y, x].item()
            total += math.log1p(math.exp(-value if positive else value))
    return total / logits.numel()


@pytest.mark.parametrize("ignore", [255, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_loss_is_the_mean_cross_entropy(ignore: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 5, 7), generator=generator)
    labels[0, :2] = ignore
    loss = segmentation_loss(logits, labels.to(dtype), ignore)
    assert loss.item() == pytest.approx(slow_loss(logits, labels, ignore), rel=1e-12)
    # An ignored pixel is not left out: it counts as a pixel of no class.
    labels[0, 0] = 1 if ignore == 2 else 2
    assert segmentation_loss(logits, labels.to(dtype), ignore).item() != pytest.approx(loss.item(), rel=1e-3)


def test_logits_are_resized_to_the_labels() -> None:
    logits = torch.tensor([[[[0.0, 4.0]]]], dtype=torch.float64)
    wide = torch.tensor([[[[0.0, 1.0, 3.0, 4.0]]]], dtype=torch.float64)  # bilinear, corners not aligned
    labels = torch.tensor([[[0, 255, 0, 255]]])
    expected = slow_loss(wide, labels, 255)
    assert segmentation_loss(logits, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("label", [4, 254, -1, 256])
def test_bad_labels(label: int) -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, 2, 1] = label
    with pytest.raises(ValueError, match=f"labels: {label} is not one of 4 classes or the ignore label 255"):
        segmentation_loss(torch.zeros(1, 4, 4, 4), labels)


def batch() -> list[dict[str, Any]]:
    """Two images of different sizes with labels of one, as upstream's dataset mapper makes them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, len(CLASSES), (2, 80, 64), generator=generator)
    labels[:, :9] = 255
    images = (picture(80, 64, "a"), picture(70, 50, "b"))
    return [{"image": image, "sem_seg": label} for image, label in zip(images, labels, strict=True)]


def loss_and_gradients(model: CATSeg) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)  # of drop path
    model.train()
    losses = model(batch())
    assert isinstance(losses, dict)
    assert losses.keys() == {"loss_sem_seg"}
    loss = losses["loss_sem_seg"]
    assert loss.shape == ()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@versions
@pytest.mark.parametrize("rule", ["attention", "full", "none"])
def test_gradients_reach_what_is_trained(version: Version, rule: str) -> None:
    model = tiny_model(version, clip_finetune=rule, train_backbone=True, backend="reference")
    _, gradients = loss_and_gradients(model)
    clip = "sem_seg_head.predictor.clip_model."
    # Dense features use only the last block's values.
    unused = {f"{clip}{IMAGE_BLOCKS[-1]}.attn.{part}_proj_weight" for part in "qk"}
    assert gradients.keys() == trained(model) - unused
    silent = {name for name, gradient in gradients.items() if not gradient.any()}
    assert silent <= key_biases(model)


def key_biases(model: CATSeg) -> set[str]:
    """Return the biases of the keys of a softmax, on which no output depends; the engine leaves them out."""
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if ".swin_block." in name and name.endswith(".k.bias")}


@versions
def test_the_engine_trains_as_the_reference_does(version: Version) -> None:
    model = tiny_model(version, train_backbone=True, backend="reference").double()
    loss, gradients = loss_and_gradients(model)
    model.zero_grad()
    model.backend = "torch"
    model.engine.chunk = 2
    engine_loss, engine_gradients = loss_and_gradients(model)
    torch.testing.assert_close(engine_loss, loss, rtol=1e-12, atol=0)
    assert engine_gradients.keys() == gradients.keys() - key_biases(model)
    for name, gradient in engine_gradients.items():
        assert (gradient - gradients[name]).norm() <= 1e-9 * gradients[name].norm() + 1e-15, name


@versions
def test_an_optimiser_lowers_the_loss(version: Version) -> None:
    model = tiny_model(version, backend="torch")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        losses.append(loss_and_gradients(model)[0])
        optimiser.step()
    assert losses[2] < losses[1] < losses[0]
    model.eval()
    (engine,) = model([{"image": picture(60, 90), "height": 8, "width": 9}])
    model.backend = "reference"
    (reference,) = model([{"image": picture(60, 90), "height": 8, "width": 9}])
    torch.testing.assert_close(engine["sem_seg"], reference["sem_seg"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_training_with_more_classes_than_the_limit(backend: str) -> None:
    classes = [f"thing {index}" for index in range(12)]
    model = tiny_model("v2", classes, backend=backend)
    loss, gradients = loss_and_gradients(model)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
