"""The reference against outputs of the real upstream code (tests/golden/GOLDEN.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from catseg_fast import reference
from catseg_fast.config import CLIP_PIXEL_MEAN, VARIANTS, CLIPConfig, ResNetConfig, SwinConfig, Variant
from catseg_fast.reference.clip import DenseCLIP
from catseg_fast.reference.model import CATSeg
from catseg_fast.text.prompts import get_templates
from catseg_fast.text.tokens import tokenize
from support.golden_rule import GOLDEN, Meta, assert_output, check_sha_weights, fill, load_case, make_inputs

CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def cases(kind: str) -> list[str]:
    return [name for name in CASES if load_case(name)[1]["kind"] == kind]


def clip_config(dims: dict[str, int]) -> CLIPConfig:
    return CLIPConfig(
        embed_dim=dims["embed_dim"],
        image_size=dims["image_resolution"],
        input_size=384 if dims["vision_patch_size"] == 16 else 336,
        patch_size=dims["vision_patch_size"],
        vision_width=dims["vision_width"],
        vision_layers=dims["vision_layers"],
        vision_heads=dims["vision_width"] // 64,
        text_width=dims["transformer_width"],
        text_heads=dims["transformer_heads"],
        text_layers=dims["transformer_layers"],
    )


def variant_of(meta: Meta) -> Variant:
    head, build = meta["cfg"], meta["build"]
    base = VARIANTS["v1-vitl-swinb" if meta["version"] == "v1" else "v2-vitl"]
    backbone = ResNetConfig(50) if build.get("backbone") == "r50" else SwinConfig(depths=(2, 2, 2))
    return replace(
        base,
        name=meta["case"],
        clip=clip_config(meta["clip_dims"]),
        appearance_guidance_dim=head["APPEARANCE_GUIDANCE_DIM"],
        decoder_guidance_dims=tuple(head["DECODER_GUIDANCE_DIMS"]),
        guidance_layers=(3, 7) if meta["clip_name"] == "ViT-B/16" else (7, 15),
        pooling_size=tuple(head["POOLING_SIZES"]),
        pad_len=build.get("pad_len", base.pad_len),
        backbone=backbone if meta["version"] == "v1" else None,
    )


def build_model(meta: Meta, model_type: type[CATSeg]) -> CATSeg:
    """The whole model of a case, with its weights."""
    model = model_type(
        variant_of(meta),
        meta["classes"],
        sliding_window=meta["build"].get("sliding_window", False),
        prompt_ensemble=meta["templates"],
    )
    fill(model, meta["prefix"], meta["seed"])
    check_sha_weights(model.state_dict(), meta)
    return model.eval()


def record(model: CATSeg) -> dict[str, Tensor]:
    """Let the model's next forward leave its intermediate results in the returned dict."""
    recorded: dict[str, Tensor] = {}
    encode_images, logits = model.encode_images, model.logits

    def recording_encode(*images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        features, maps = encode_images(*images)
        recorded["clip_features"] = features
        levels = (3, 4, 5) if model.variant.version == "v2" else (4, 3, 2)
        recorded.update({f"guidance_res{level}": x for level, x in zip(levels, maps, strict=True)})
        return features, maps

    def recording_logits(*images: Tensor) -> Tensor:
        recorded["logits"] = logits(*images)
        recorded["text_feats"] = model.text_features()[None]
        return recorded["logits"]

    model.encode_images, model.logits = recording_encode, recording_logits  # type: ignore[method-assign]
    return recorded


def run_module(meta: Meta, module: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if meta["case"].startswith("sub_corr"):
        corr = module.correlation(inputs["img_feats"], inputs["text_feats"])
        return {"corr": corr, "out": module.corr_embed(corr)}
    if meta["cls"] == "Aggregator":
        guidance = [inputs.get(f"guidance{i}") for i in range(3)]
        return {"out": module(inputs["img_feats"], inputs["text_feats"], guidance)}
    return {"out": module(inputs["x"], inputs.get("guidance"))}


def constructor_arguments(meta: Meta) -> dict[str, Any]:
    arguments = dict(meta["kwargs"])
    if meta["version"] == "v1" and meta["cls"] in ("Aggregator", "ClassTransformerLayer"):
        arguments.setdefault("pad_len", 0)
    return arguments


def golden_image(meta: Meta, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The first image as the model's input.

    Upstream pads two images to a common size; here each is on its own, so that one case's first image gets
    upstream's padding, zero after normalisation, by hand.
    """
    image = inputs["image0"]
    if meta["case"] == "model_v2_twoimages":
        height, width = (max(x.shape[axis] for x in inputs.values()) for axis in (1, 2))
        padded = torch.tensor(CLIP_PIXEL_MEAN).view(3, 1, 1).expand(3, height, width).clone()
        padded[:, : image.shape[1], : image.shape[2]] = image
        image = padded
    entry: dict[str, Any] = {"image": image}
    if meta["sizes"] is not None:
        entry["height"], entry["width"] = meta["sizes"][0]
    return entry


def test_every_case_is_covered() -> None:
    assert len(CASES) == 53
    assert sorted(cases("module") + cases("model") + cases("part")) == CASES


@pytest.mark.parametrize("name", cases("module"))
def test_module(name: str) -> None:
    case = load_case(name)
    _, meta = case
    module = getattr(reference, meta["cls"])(**constructor_arguments(meta)).eval()
    fill(module, meta["prefix"], meta["seed"])
    check_sha_weights(module.state_dict(), meta)
    with torch.no_grad():
        outputs = run_module(meta, module, make_inputs(meta))
    for output, tensor in outputs.items():
        assert_output(case, output, tensor)
    if "kept_first_batch" in meta:
        kept = (outputs["out"][0] != -100).flatten(1).any(1).nonzero().flatten().tolist()
        assert kept == meta["kept_first_batch"]
        assert (outputs["out"][0] == -100).flatten(1).all(1).sum() == len(outputs["out"][0]) - len(kept)


@pytest.mark.parametrize("name", cases("model"))
def test_model(name: str) -> None:
    case = load_case(name)
    _, meta = case
    model = build_model(meta, CATSeg)
    recorded = record(model)
    with torch.no_grad():
        out = model([golden_image(meta, make_inputs(meta))])[0]["sem_seg"]
    assert_output(case, "out", out, factor=0, floor=1e-4)
    if name == "model_v2_twoimages":
        case = (case[0], {**meta, "outputs": first_of_batch(case)})
    for output, tensor in recorded.items():
        assert_output(case, output, tensor)
    tokens = [ids[: len(ids) // len(model.templates)] for ids in model._tokens[False]]
    assert_output(case, "tokens_template0", torch.cat(tokens))


def first_of_batch(case: tuple[dict[str, Any], Meta]) -> dict[str, Any]:
    """Output descriptions of a case of two images, cut down (with the arrays) to the first image."""
    arrays, meta = case
    specs = {}
    for name, spec in meta["outputs"].items():
        if spec["shape"][0] == 2:
            shape = [1, *spec["shape"][1:]]
            count = -(-torch.Size(shape).numel() // spec["stride"])
            arrays[f"out_{name}"] = arrays[f"out_{name}"][:count]
            spec = {**spec, "shape": shape}
        specs[name] = spec
    return specs


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_clip(version: Any) -> None:
    case = load_case(f"part_clip_{version}_tiny")
    _, meta = case
    dims = load_case("model_v2_T5")[1]["clip_dims"]
    clip = DenseCLIP(clip_config(dims), version).eval()
    fill(clip, meta["prefix"], meta["seed"])
    check_sha_weights(clip.state_dict(), meta)
    image = make_inputs(meta)["image"]
    texts = [
        "A photo of a cat in the scene",
        "a bad photo of a traffic light.",
        "x",
        "itap of the crt screen, screen.",
    ]
    tokens = tokenize(texts)
    with torch.no_grad():
        outputs = {
            "out": clip.encode_dense(image)[0],
            "cls": clip.encode_image(image[..., :224, :224]),
            "text": clip.encode_text(tokens),
            "tokens": tokens,
        }
        shortened = clip.encode_text(tokens[:, : int(tokens.argmax(-1).max()) + 1])
    for output, tensor in outputs.items():
        assert_output(case, output, tensor)
    assert_output(case, "text", shortened)


def test_template_lists_are_upstreams() -> None:
    for name in ("model_v1_T5", "model_v2_T5", "model_v1_small_single_p22"):
        meta = load_case(name)[1]
        ensemble = "imagenet" if len(meta["templates"]) == 80 else "single"
        assert get_templates(ensemble) == tuple(meta["templates"])


def test_guidance_maps_are_ordered_coarse_to_fine() -> None:
    meta = load_case("model_v2_T5")[1]
    model = build_model(meta, CATSeg)
    with torch.no_grad():
        image = rearrange(make_inputs(meta)["image0"], "C H W -> 1 C H W")
        _, maps = model.encode_images(image, image)
    assert [tuple(x.shape[1:]) for x in maps] == [(96, 24, 24), (256, 48, 48), (128, 96, 96)]
