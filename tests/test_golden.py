"""The reference against outputs of the real upstream code (tests/golden/GOLDEN.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from catseg_fast import reference
from catseg_fast.reference.clip import DenseCLIP
from catseg_fast.reference.model import CATSeg
from catseg_fast.text.prompts import get_templates
from catseg_fast.text.tokens import tokenize
from support.golden_models import (
    CASES,
    LONG,
    build_model,
    cases,
    clip_config,
    constructor_arguments,
    golden_image,
    parameters,
)
from support.golden_rule import Meta, assert_output, check_sha_weights, fill, load_case, make_inputs

# The engine answers these, too, in a third of the time; `model_v2_T300` selects classes, as they do.
LONG_WITHOUT_THE_ENGINE = ("agg_v2_T256_p22", "agg_v2_T300_B2_p22")


def record(model: CATSeg) -> dict[str, Tensor]:
    """Let the model's next forward pass leave its intermediate results in the returned dict."""
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


def test_every_case_is_covered() -> None:
    assert len(CASES) == 53
    assert sorted(cases("module") + cases("model") + cases("part")) == CASES


@pytest.mark.parametrize("name", parameters(cases("module"), (*LONG, *LONG_WITHOUT_THE_ENGINE)))
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
    """Return the outputs of a case of two images, reduced (with the arrays) to the first image."""
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
