"""The drop-in: classes and weights that change, several images, back ends, limits, and bad input."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from catseg_fast import CATSeg, SlidingWindow
from catseg_fast.config import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, PIXEL_MEAN, PIXEL_STD, Version
from support.golden_rule import fill, weight
from support.tiny import CLASSES, TEMPLATES, V1, V2, close, picture, sem_seg, tiny_model

VERSIONS: tuple[Version, ...] = ("v1", "v2")
OTHERS = ("cat", "dog, hound", "wall")
WINDOW = SlidingWindow(96, 0.25, (96, 140))  # two crops, and the whole image
SMALL = {"height": 24, "width": 32}
IMAGE = picture(60, 90)

versions = pytest.mark.parametrize("version", VERSIONS)
backends = pytest.mark.parametrize("backend", ["torch", "reference"])
paths = pytest.mark.parametrize("sliding", [True, False], ids=["sliding", "whole"])


def labels(count: int) -> Tensor:
    return (torch.arange(60 * 90) % count).view(60, 90)


def training_call(model: CATSeg, count: int) -> None:
    """A forward in training mode with labels below `count`."""
    model.train()
    model([{"image": IMAGE, "sem_seg": labels(count)}])
    model.eval()


# ---- classes ----------------------------------------------------------------------------------------------


@versions
@backends
def test_new_classes_take_effect_at_once(version: Version, backend: str) -> None:
    model = tiny_model(version, sliding_window=False, backend=backend)
    before = sem_seg(model, IMAGE, **SMALL)
    model.set_classes(OTHERS)
    fresh = tiny_model(version, OTHERS, sliding_window=False, backend=backend)
    assert model.classes == OTHERS
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), sem_seg(fresh, IMAGE, **SMALL))
    model.set_classes(list(CLASSES))
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), before)
    training_call(model, len(CLASSES))
    model.set_classes(OTHERS)
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), sem_seg(fresh, IMAGE, **SMALL))


@versions
def test_training_has_its_own_classes(version: Version) -> None:
    model = tiny_model(version, train_classes=OTHERS, sliding_window=False)
    training_call(model, len(OTHERS))  # before the first evaluation
    assert model.classes == CLASSES
    expected = sem_seg(tiny_model(version, sliding_window=False), IMAGE, **SMALL)
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), expected)
    model.train()
    assert model.classes == OTHERS
    with pytest.raises(ValueError, match="3 is not one of 3 classes"):
        model([{"image": IMAGE, "sem_seg": labels(4)}])
    model.set_classes(("a", "b", "c", "d"), training=True)
    model([{"image": IMAGE, "sem_seg": labels(4)}])
    model.eval()
    assert model.classes == CLASSES


def test_classes_of_one_mode_serve_both_where_alone() -> None:
    assert tiny_model().train().classes == CLASSES
    assert tiny_model(classes=None, train_classes=OTHERS).classes == OTHERS


def test_refused_classes_leave_the_present_ones() -> None:
    model = tiny_model(sliding_window=False)
    before = sem_seg(model, IMAGE, **SMALL)
    for refused in ([], ["x", "x"], ["cat", "very " * 80]):
        with pytest.raises(ValueError, match="classes: "):
            model.set_classes(refused)
    assert model.classes == CLASSES
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), before)


def test_no_classes() -> None:
    model = tiny_model(classes=None)
    for call in (lambda: model([{"image": IMAGE}]), lambda: model.segment(IMAGE), model.explain):
        with pytest.raises(ValueError, match=r"classes: none are set; call set_classes"):
            call()


# ---- weights ----------------------------------------------------------------------------------------------

TEXT_TOWER = (
    "token_embedding.weight",
    "positional_embedding",
    "transformer.resblocks.1.ln_1.weight",
    "ln_final.bias",
    "text_projection",
)


@versions
def test_text_features_follow_the_text_tower(version: Version) -> None:
    model, fresh = tiny_model(version), tiny_model(version)
    before = model.text_features()
    for name in TEXT_TOWER:
        with torch.no_grad():
            model.clip_model.get_parameter(name).mul_(-0.5)
        after = model.text_features()
        assert not close(after, before, 1e-3), name
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(after, fresh.text_features()), name
        assert model.text_features() is after  # kept
        before = after


def test_the_image_tower_has_no_say_in_text_features() -> None:
    model = tiny_model()
    before = model.text_features()
    with torch.no_grad():
        model.clip_model.visual.conv1.weight.zero_()
    assert model.text_features() is before


@versions
@backends
def test_loading_weights_takes_effect(version: Version, backend: str) -> None:
    model = tiny_model(version, sliding_window=False, backend=backend)
    before = sem_seg(model, IMAGE, **SMALL)
    other = tiny_model(version, sliding_window=False, backend="reference")
    fill(other, seed=1)
    expected = sem_seg(other, IMAGE, **SMALL)
    assert not close(before, expected, 1e-2)
    model.load_state_dict(other.state_dict())
    assert close(sem_seg(model, IMAGE, **SMALL), expected)


@torch.no_grad()
def test_every_weight_of_the_aggregator_remakes_the_plan() -> None:
    model = tiny_model()
    plan = model.engine.plan()
    assert model.engine.plan() is plan
    for name, parameter in model.aggregator.named_parameters():
        parameter.mul_(0.9)
        assert model.engine.plan() is not plan, name
        plan = model.engine.plan()


def test_rounded_weights_take_effect() -> None:
    model = tiny_model(sliding_window=False)
    before = sem_seg(model, IMAGE, **SMALL)
    model.to(torch.bfloat16).to(torch.float32)
    fresh = tiny_model(sliding_window=False)
    fresh.load_state_dict(model.state_dict())
    after = sem_seg(model, IMAGE, **SMALL)
    assert not close(after, before, 1e-4)
    assert torch.equal(after, sem_seg(fresh, IMAGE, **SMALL))


def test_a_copy_has_weights_of_its_own() -> None:
    model = tiny_model(sliding_window=False)
    before = sem_seg(model, IMAGE, **SMALL)
    duplicate = copy.deepcopy(model)
    fill(duplicate, seed=1)
    expected = tiny_model(sliding_window=False, backend="reference")
    fill(expected, seed=1)
    assert close(sem_seg(duplicate, IMAGE, **SMALL), sem_seg(expected, IMAGE, **SMALL))
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), before)


@versions
def test_a_call_under_autocast_leaves_nothing_rounded(version: Version) -> None:
    model = tiny_model(version, sliding_window=False)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sem_seg(model, IMAGE, **SMALL)
    expected = sem_seg(tiny_model(version, sliding_window=False), IMAGE, **SMALL)
    assert close(rounded, expected, 0.1)
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), expected)


@versions
def test_a_call_in_inference_mode_leaves_nothing_that_cannot_train(version: Version) -> None:
    model = tiny_model(version, sliding_window=False)
    for parameter in model.aggregator.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        sem_seg(model, IMAGE, **SMALL)
    model.train()
    model([{"image": IMAGE, "sem_seg": labels(5)}])["loss_sem_seg"].backward()


# ---- checkpoints ------------------------------------------------------------------------------------------


@versions
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("derived", [True, False], ids=["whole", "without derived buffers"])
def test_from_pretrained(version: Version, suffix: str, derived: bool, tmp_path: Path) -> None:
    model = tiny_model(version)
    path = tmp_path / f"model{suffix}"
    ignored = ("attn_mask", "relative_position_index")
    state_dict = {key: x for key, x in model.state_dict().items() if derived or not key.endswith(ignored)}
    torch.save({"model": state_dict}, path) if suffix == ".pth" else save_file(state_dict, path)
    arguments: Any = {"variant": V1, "prompt_ensemble": TEMPLATES} if version == "v1" else {"variant": V2}
    loaded = CATSeg.from_pretrained(path, CLASSES, device="cpu", sliding_window=False, **arguments)
    assert not loaded.training
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]
    model.sliding_window = False
    assert torch.equal(sem_seg(loaded, IMAGE, **SMALL), sem_seg(model, IMAGE, **SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files_and_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(sliding_window=False, backend="reference").half()
    torch.save(model.state_dict(), tmp_path / "half.pth")
    loaded = CATSeg.from_pretrained(
        tmp_path / "half.pth", CLASSES, variant=V2, device="cpu", dtype=dtype, sliding_window=False
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    out = sem_seg(loaded, IMAGE, **SMALL)
    assert out.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert close(out, sem_seg(model.float(), IMAGE, **SMALL), tolerance)


def test_a_checkpoint_of_another_variant(tmp_path: Path) -> None:
    torch.save(tiny_model().state_dict(), tmp_path / "v2.pth")
    with pytest.raises(ValueError, match=r"v2\.pth does not fit the model.*custom-v2.*is tiny-v1"):
        CATSeg.from_pretrained(tmp_path / "v2.pth", CLASSES, variant=V1, prompt_ensemble=TEMPLATES)
    with pytest.raises(ValueError, match="no variant is named 'v3-vitl'"):
        CATSeg.from_pretrained(tmp_path / "v2.pth", variant="v3-vitl")


# ---- images -----------------------------------------------------------------------------------------------


@versions
@paths
def test_each_image_of_a_batch_is_as_if_alone(version: Version, sliding: bool) -> None:
    model = tiny_model(version, sliding_window=sliding, window=WINDOW)
    batch: list[dict[str, Any]] = [
        {"image": picture(60, 90, "a"), "height": 30, "width": 20},
        {"image": picture(150, 40, "b"), "width": 7},
    ]
    together = model(batch)
    sizes = [(30, 20), (96 if sliding else 150, 7)]
    assert [tuple(result["sem_seg"].shape) for result in together] == [(5, *size) for size in sizes]
    for entry, result in zip(batch, together, strict=True):
        assert torch.equal(result["sem_seg"], model([entry])[0]["sem_seg"])
    for segmentation, result in zip(model.label_map(batch), together, strict=True):
        assert torch.equal(segmentation.labels, result["sem_seg"].argmax(dim=0).int())
    assert model([]) == model.label_map([]) == []


@paths
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float64, torch.float16], ids=str)
def test_the_type_of_the_pixels_does_not_matter(sliding: bool, dtype: torch.dtype) -> None:
    model = tiny_model(sliding_window=sliding, window=WINDOW)
    assert torch.equal(sem_seg(model, IMAGE.to(dtype), **SMALL), sem_seg(model, IMAGE, **SMALL))


def test_without_a_size_the_sliding_window_answers_in_its_resolution() -> None:
    assert sem_seg(tiny_model(), IMAGE).shape == (5, 640, 640)


def test_evaluation_leaves_no_graph() -> None:
    result = sem_seg(tiny_model(sliding_window=False), IMAGE.clone().requires_grad_())
    assert not result.requires_grad


def normalised(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def probabilities(model: CATSeg, image: Tensor, size: tuple[int, int]) -> Tensor:
    """`[T, *size]` of one image on its own, by the reference: resize, logits, resize, sigmoid."""
    clip_images = normalised(image, CLIP_PIXEL_MEAN, CLIP_PIXEL_STD)[None]
    images = normalised(image, PIXEL_MEAN, PIXEL_STD)[None]
    model.backend = "reference"
    with torch.no_grad():
        logits = model.logits(clip_images, images)
    assert logits.shape[-2:] == (96, 96)
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).sigmoid()[0]


@versions
@pytest.mark.parametrize(
    "window",
    [
        SlidingWindow(96, 0.25, (140, 170)),
        SlidingWindow(64, 0.0, (100, 64)),
        SlidingWindow(50, 0.9, (50, 61)),
        SlidingWindow(80, 0.5, (80, 80)),
    ],
    ids=str,
)
def test_sliding_windows_that_do_not_tile(version: Version, window: SlidingWindow) -> None:
    model = tiny_model(version, window=window)
    actual = sem_seg(model, IMAGE)
    side, (height, width) = window.crop_size, window.resolution
    stride = int(side * (1 - window.overlap))
    resized = F.interpolate(IMAGE[None], (height, width), mode="bilinear", align_corners=False)[0]
    total, count = torch.zeros(5, height, width), torch.zeros(height, width)
    for top in range(0, height, stride):
        for left in range(0, width, stride):
            y, x = min(top, height - side), min(left, width - side)
            if count[y : y + side, x : x + side].min() and (y, x) != (top, left):
                continue  # past the border, and seen already
            crop = resized[:, y : y + side, x : x + side]
            total[:, y : y + side, x : x + side] += probabilities(model, crop, (side, side))
            count[y : y + side, x : x + side] += 1
    assert count.min() >= 1
    whole = F.interpolate(IMAGE[None], (side, side), mode="bilinear", align_corners=False)[0]
    whole = F.interpolate(
        probabilities(model, whole, (side, side))[None], (height, width), mode="bilinear", align_corners=False
    )[0]
    assert close(actual, (total / count + whole) / 2)


@pytest.mark.parametrize("arguments", [(0,), (700,), (384, 1.0), (384, -0.1), (2, 0.9)])
def test_impossible_windows(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"^(crop_size|overlap): "):
        SlidingWindow(*arguments)


@versions
@backends
def test_nan_pixels_propagate(version: Version, backend: str) -> None:
    image = IMAGE.clone()
    image[1, 5, 5] = math.nan
    model = tiny_model(version, window=WINDOW, backend=backend)
    good = {"image": IMAGE, **SMALL}
    bad, fine = model([{"image": image, **SMALL}, good])
    assert bad["sem_seg"].isnan().all()
    assert torch.equal(fine["sem_seg"], sem_seg(model, IMAGE, **SMALL))
    assert not model.label_map([{"image": image, **SMALL}])[0].labels.any()
    with pytest.raises(ValueError, match="image: 1 of 16200 values are NaN"):
        model.segment(image)


@paths
@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(1, 60, 90), ValueError, r"\(1, 60, 90\) is not \[3, H, W\]"),
        (torch.zeros(60, 90, 3), ValueError, r"\(60, 90, 3\) is not \[3, H, W\]"),
        (torch.zeros(60, 90), ValueError, r"\(60, 90\) is not \[3, H, W\]"),
        (torch.zeros(1, 3, 60, 90), ValueError, r"\(1, 3, 60, 90\) is not \[3, H, W\]"),
        (torch.zeros(3, 0, 90), ValueError, r"\(3, 0, 90\) is not \[3, H, W\]"),
        (torch.zeros(3, 60, 90).numpy(), TypeError, r"expected a tensor \[3, H, W\], got ndarray"),
        ("photo.jpg", TypeError, r"expected a tensor \[3, H, W\], got str"),
    ],
)
def test_bad_images(sliding: bool, image: Any, error: type[Exception], message: str) -> None:
    model = tiny_model(sliding_window=sliding, window=WINDOW)
    labels = torch.zeros(IMAGE.shape[1:], dtype=torch.long)
    for call in (model, model.label_map, model.train()):
        with pytest.raises(error, match=r"^batched_inputs\[1\]\['image'\]: .*" + message):
            call([{"image": IMAGE, "sem_seg": labels, **SMALL}, {"image": image, "sem_seg": labels}])


# ---- segment ----------------------------------------------------------------------------------------------


@versions
def test_segment_is_the_label_map_of_the_call(version: Version) -> None:
    model = tiny_model(version, window=WINDOW)
    segmentation = model.segment(IMAGE.byte().permute(1, 2, 0).numpy())
    maps = sem_seg(model, IMAGE, height=60, width=90)
    assert segmentation.classes == CLASSES
    assert segmentation.labels.dtype == torch.int32
    assert segmentation.scores.dtype == torch.float32
    assert segmentation.top_labels is segmentation.top_scores is None
    assert len(segmentation.labels.unique()) > 1
    assert torch.equal(segmentation.labels, maps.argmax(dim=0).int())
    assert torch.equal(segmentation.scores, maps.amax(dim=0))
    (again,) = model.label_map([{"image": IMAGE, "height": 60, "width": 90}])
    assert torch.equal(segmentation.labels, again.labels)
    assert torch.equal(segmentation.scores, again.scores)


@versions
@pytest.mark.parametrize("size", [(60, 90), (101, 133), (97, 31), (1, 1), (1, 200)])
def test_segment_of_a_whole_image_keeps_its_geometry(version: Version, size: tuple[int, int]) -> None:
    model = tiny_model(version)
    image = picture(*size)
    segmentation = model.segment(image, sliding_window=False)
    maps = normalised_maps(model, image)
    assert segmentation.labels.shape == size
    assert close(segmentation.scores, maps.amax(dim=0))
    chosen = maps.gather(0, segmentation.labels[None].long())[0]
    assert close(chosen, segmentation.scores)


def normalised_maps(model: CATSeg, image: Tensor) -> Tensor:
    """The reference's 96x96 probabilities of a resized image, resized to its size."""
    maps = probabilities(model, image, (96, 96))[None]
    return F.interpolate(maps, image.shape[-2:], mode="bilinear", align_corners=False)[0]


@versions
def test_the_call_keeps_upstreams_geometry(version: Version) -> None:
    model = tiny_model(version, sliding_window=False)
    tiling, small, odd = picture(96, 160), picture(60, 90), picture(101, 133)
    assert close(sem_seg(model, tiling), normalised_maps(model, tiling))
    for image in (small, odd):
        assert not close(sem_seg(model, image), normalised_maps(model, image), 1e-2)


@pytest.mark.parametrize("sliding", [True, False])
def test_one_pixel(sliding: bool) -> None:
    segmentation = tiny_model(window=WINDOW).segment(torch.full((3, 1, 1), 99.0), sliding_window=sliding)
    assert segmentation.labels.shape == segmentation.scores.shape == (1, 1)
    assert 0 < segmentation.scores.item() < 1


@paths
def test_top_classes(sliding: bool) -> None:
    model = tiny_model(sliding_window=sliding, window=WINDOW)
    best, top = model.segment(IMAGE), model.segment(IMAGE, top_k=3)
    assert top.top_labels is not None
    assert top.top_scores is not None
    assert top.top_labels.shape == top.top_scores.shape == (3, 60, 90)
    assert torch.equal(top.top_labels[0], best.labels)
    assert torch.equal(top.labels, best.labels)
    assert torch.equal(top.scores, best.scores)
    (every,) = model.label_map([{"image": IMAGE, "height": 60, "width": 90}], top_k=99)
    assert every.top_labels is not None
    assert every.top_scores is not None
    maps = sem_seg(model, IMAGE, height=60, width=90)
    assert torch.equal(every.top_scores, maps.sort(dim=0, descending=True).values)
    assert torch.equal(maps.gather(0, every.top_labels.long()), every.top_scores)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"top_k: {wrong} is not positive"):
            model.segment(IMAGE, top_k=wrong)


# ---- back ends, limits, memory ----------------------------------------------------------------------------


@versions
@paths
@pytest.mark.parametrize("count", [1, 12])
def test_back_ends_agree(version: Version, sliding: bool, count: int) -> None:
    classes = [f"thing {index}" for index in range(count)]
    model = tiny_model(version, classes, sliding_window=sliding, window=WINDOW, backend="reference")
    expected = sem_seg(model, IMAGE, **SMALL)
    assert expected.shape == (count, 24, 32)
    assert expected.isfinite().all()
    for backend in ("torch", "auto"):
        model.backend = backend
        assert model.backend == model.aggregator.backend == backend
        assert close(sem_seg(model, IMAGE, **SMALL), expected)


def test_unknown_back_ends() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="backend: 'cuda' is not one of auto, triton, torch, reference"):
        model.backend = "cuda"
    assert model.backend == "auto"
    with pytest.raises(ValueError, match="backend: 'cuda' is not one of"):
        tiny_model(backend="cuda")


def test_a_back_end_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_model(backend="triton")
    for call in (lambda: model([{"image": IMAGE}]), lambda: model.segment(IMAGE), model.explain):
        with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run: \w+"):
            call()
    model.backend = "torch"
    model.segment(IMAGE, sliding_window=False)


@backends
def test_limited_vocabulary(backend: str) -> None:
    classes = [f"thing {index}" for index in range(12)]
    model = tiny_model("v2", classes, sliding_window=False, backend=backend)
    assert model.max_classes == V2.pad_len
    limited = sem_seg(model, IMAGE, **SMALL)
    dropped = limited.flatten(1).amax(dim=1) < 1e-30
    assert dropped.sum() == 12 - V2.pad_len
    zero = torch.full((), -100.0).sigmoid()
    assert limited[dropped].max() <= zero
    model.max_classes = None
    every = sem_seg(model, IMAGE, **SMALL)
    assert every.min() > 1e-6
    model.max_classes = 12
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), every)
    model.max_classes = V2.pad_len
    assert torch.equal(sem_seg(model, IMAGE, **SMALL), limited)


@versions
@backends
def test_each_crop_chooses_its_own_classes(version: Version, backend: str) -> None:
    classes = [f"thing {index}" for index in range(9)]
    model = tiny_model(version, classes, window=WINDOW, max_classes=2, backend=backend)
    limited = sem_seg(model, IMAGE)
    model.backend = "reference"
    expected = sem_seg(model, IMAGE)
    assert close(limited, expected)
    assert 2 <= (expected.flatten(1).amax(dim=1) > 1e-30).sum() < 9


def test_no_limit_by_default_in_v1() -> None:
    assert tiny_model("v1").max_classes is None
    assert tiny_model("v1", max_classes=3).max_classes == 3
    assert tiny_model("v2", max_classes=None).max_classes is None


@pytest.mark.parametrize("count", [0, -3])
def test_a_limit_that_is_not_positive(count: int) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=f"max_classes: {count} is not positive"):
        model.max_classes = count
    assert model.max_classes == V2.pad_len
    with pytest.raises(ValueError, match=f"max_classes: {count} is not positive"):
        tiny_model(max_classes=count)


def test_explain() -> None:
    lines = explained(tiny_model())
    assert lines["back end"] == "torch (asked for: auto)"
    assert lines["classes"] == "5, all aggregated"
    assert lines["precision"] == "float32"
    assert lines["policy"].startswith("resident: ")
    assert lines["step"].endswith("classes of 5 crops")
    model = tiny_model(classes=[f"thing {index}" for index in range(12)], sliding_window=False)
    assert explained(model)["classes"] == "12, the best 8 per crop"
    assert explained(model)["step"].endswith("classes of 1 crops")
    model.engine.policy, model.engine.chunk = "recompute", 3
    assert explained(model)["policy"] == "recompute: asked for"
    assert explained(model)["step"] == "3 classes of 1 crops"
    model.backend = "reference"
    assert explained(model).keys() == {"back end", "classes"}


def explained(model: CATSeg) -> dict[str, str]:
    return {line[:10].strip(): line[11:] for line in model.explain().splitlines()}


@versions
@paths
def test_a_budget_that_is_too_small_names_the_least(version: Version, sliding: bool) -> None:
    model = tiny_model(version, sliding_window=sliding, window=WINDOW)
    expected = sem_seg(model, IMAGE, **SMALL)
    model.engine.memory_budget = "1KiB"
    with pytest.raises(ValueError, match=r"memory_budget: 1.0 KiB does not hold") as caught:
        sem_seg(model, IMAGE, **SMALL)
    least = int(re.search(r"the least that works is .* \((\d+) bytes\)", str(caught.value))[1])  # type: ignore[index]
    model.engine.memory_budget = least
    assert close(sem_seg(model, IMAGE, **SMALL), expected)
    model.engine.memory_budget = least - 1
    with pytest.raises(ValueError, match=f"{least} bytes"):
        sem_seg(model, IMAGE, **SMALL)
    with pytest.raises(ValueError, match="memory_budget"):
        tiny_model(memory_budget="plenty")


@versions
def test_a_budget_that_explains_itself_holds_a_call(version: Version) -> None:
    model = tiny_model(version, window=WINDOW, memory_budget=1000)
    with pytest.raises(ValueError, match="the least that works is") as caught:
        model.explain()
    least = int(re.search(r"\((\d+) bytes\)", str(caught.value))[1])  # type: ignore[index]
    model.engine.memory_budget = least + 8 * 24 * 32  # and the answer
    assert model.label_map([{"image": IMAGE, **SMALL}])[0].labels.shape == (24, 32)


def test_weights_by_the_rule() -> None:
    """The tiny models are what their names say; else the tests above compare nothing."""
    state = tiny_model("v1").state_dict()
    key = "sem_seg_head.predictor.transformer.conv1.weight"
    assert torch.equal(state[key], weight(key, (32, 2, 7, 7)))
