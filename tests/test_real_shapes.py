"""Every op at the shapes of the published variants: 5 crops and up to 1203 classes on a GPU.

`pytest -m gpu` runs the large ones. Without a GPU, the same checks run on one crop and two classes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from catseg_fast.kernels import load
from catseg_fast.kernels.launch.op import Random
from support.accuracy import assert_near_the_plain_form

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")]
shapes = pytest.mark.parametrize(
    ("crops", "classes"),
    [(1, 2), *(pytest.param(5, classes, marks=on_gpu) for classes in (1, 150, 256, 847, 1203))],
)
types = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float16, marks=on_gpu),
        pytest.param(torch.bfloat16, marks=on_gpu),  # which the interpreter computes incorrectly
    ],
    ids=str,
)
# By op, the arguments that have classes in their second dimension.
OF_CLASSES = {
    "embed_cost_volume": ("text",),
    "window_block": ("x",),
    "class_apply": ("x", "text_query"),
    "decode": ("x",),
}
CASES = [
    pytest.param(name, variant, id=", ".join(filter(None, (name, variant))), marks=marks)
    for name in (*OF_CLASSES, "class_collect", "update_label_map")
    for variant in load(name).sizes
    for marks in [on_gpu if variant == "P=80" else []]
    if variant != "whole image"
]


@shapes
@types
@pytest.mark.parametrize(("name", "variant"), CASES)
@torch.no_grad()
def test_matches_its_plain_form(
    name: str, variant: str, crops: int, classes: int, dtype: torch.dtype
) -> None:
    """Ops that treat each class separately are compared on the first, middle and last classes."""
    op = load(name)
    sizes = replace(op.sizes[variant], crops=crops, classes=classes)
    if not GPU and name.startswith("class_"):
        sizes = replace(sizes, pooling=(6, 6))  # its positions take the interpreter longest
    if name == "update_label_map" and not GPU:
        sizes = replace(sizes, crops=5)
    inputs = op.make_inputs(sizes, Random(dtype, DEVICE))
    ours, kept = op.triton(**inputs), slice(None)
    if name in OF_CLASSES:
        some = {0, 1, classes // 2, classes - 2, classes - 1}
        kept = torch.tensor(sorted(some & set(range(classes))), device=DEVICE)
        assert ours.isfinite().all()
        ours = ours[:, kept]
        inputs |= {key: inputs[key][:, kept] for key in OF_CLASSES[name]}
    assert_near_the_plain_form(ours, op, inputs, equal_labels=0.9999)
