"""Images that the model accepts or refuses, and the geometry of its answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast import CATSeg, SlidingWindow
from catseg_fast.config import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, PIXEL_MEAN, PIXEL_STD, Version
from support.model_cases import IMAGE, SMALL, WINDOW, backends, paths, versions
from support.tiny import CLASSES, close, picture, sem_seg, tiny_model


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
    """Return `[T, *size]` of a single image by the reference: resize, logits, resize, sigmoid."""
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
                continue  # beyond the border, and covered already
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
    """Return the reference's 96x96 probabilities of a resized image, resized to its size."""
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
