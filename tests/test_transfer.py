"""Transfer of pictures and results between host and device; and weights without their names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from catseg_fast.inference.images import load_image
from catseg_fast.inference.transfer import to_device, to_host
from catseg_fast.weights import module_tensors
from support.tiny import tiny_model

CPU = torch.device("cpu")
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    "kind", ["array", "grey array", "array with alpha", "reversed array", "tensor", "floats"]
)
def test_a_picture_is_the_same_on_a_device(kind: str, device: str) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    image = {
        "array": rgba[..., :3].copy(),
        "grey array": rgba[..., 0],
        "array with alpha": rgba,
        "reversed array": rgba[::-1, ::-1, 2::-1],
        "tensor": torch.from_numpy(rgba).permute(2, 0, 1),
        "floats": rgba[..., :3].astype(np.float64) / 2,
    }[kind]
    there = load_image(image, device=torch.device(device))
    assert there.device.type == device
    assert there.is_contiguous()
    assert torch.equal(there.cpu(), load_image(image))
    expected = torch.from_numpy(
        np.atleast_3d(np.array(image if kind != "tensor" else rgba)).astype(np.float32)
    )
    assert torch.equal(there.cpu(), expected.permute(2, 0, 1)[:3].expand(3, -1, -1))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_there_and_back(device: str) -> None:
    first, second = torch.arange(12.0).view(3, 4).T, torch.arange(5, dtype=torch.int32)
    back = to_host(*(to_device(x, torch.device(device)) for x in (first, second)))
    for x, expected in zip(back, (first, second), strict=True):
        assert x.device == CPU
        assert not x.is_pinned()
        assert torch.equal(x, expected)


def test_a_picture_that_was_loaded_is_not_the_callers() -> None:
    for image in (torch.full((3, 2, 2), 7, dtype=torch.uint8), np.full((2, 2, 3), 7, dtype=np.uint8)):
        load_image(image, device=CPU).zero_()
        assert image.max() == 7


def test_tensors_of_a_module_are_its_parameters_and_buffers() -> None:
    model = tiny_model("v1")
    model.nothing = None
    model.register_buffer("number", torch.ones(1))
    model.register_parameter("missing", None)
    model.add_module("empty", None)
    assert list(map(id, module_tensors(model))) == list(map(id, model.parameters()))
    found = {id(x) for x in module_tensors(model, buffers=True)}
    assert found == {id(x) for x in (*model.parameters(), *model.buffers())}
    assert module_tensors(nn.Module()) == []
