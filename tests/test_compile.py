"""One compiled graph of the aggregator for vocabularies of many sizes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from catseg_fast import CATSeg
from catseg_fast.config import Version
from support.golden_rule import det, make_input
from support.tiny import V1, V2, tiny_model


def make_call(version: Version) -> tuple[CATSeg, Tensor, list[Tensor]]:
    """Return a model of one layer that selects no classes, features of an image, and its guidance."""
    model = tiny_model(version, variant=replace(V1 if version == "v1" else V2, num_layers=1))
    model.max_classes = None
    variant = model.variant
    sizes = (
        (variant.appearance_guidance_dim, 24),
        *zip(variant.decoder_guidance_dims, (48, 96), strict=True),
    )
    guidance = [det(f"compile:{side}", (1, channels, side, side)) for channels, side in sizes]
    return model, det("compile:image", (1, 32, 24, 24)), guidance


def make_text(model: CATSeg, classes: int) -> Tensor:
    text = make_input("compile:text", "text", (1, classes, len(model.templates), 32))
    torch._dynamo.mark_dynamic(text, 1)
    return text


@torch.no_grad()
def test_one_graph_serves_all_vocabularies() -> None:
    """Below, at and above the 8 classes to which v2 pads; from 16 on, one thread uses other convolutions."""
    torch.compiler.reset()
    model, image, guidance = make_call("v2")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.aggregator, fullgraph=True, backend=counter)
    for classes in (5, 3, 8, 15, 9):
        text = make_text(model, classes)
        answer = compiled(image, text, guidance)
        torch.testing.assert_close(answer, model.aggregator(image, text, guidance), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_one_graph_serves_all_vocabularies_with_gradients() -> None:
    torch.compiler.reset()
    model, image, guidance = make_call("v1")
    image.requires_grad_()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.aggregator, fullgraph=True, backend=counter)
    for classes in (5, 3, 9):
        text = make_text(model, classes)
        actual, expected = (
            torch.autograd.grad(forward(image, text, guidance).square().sum(), image)[0]
            for forward in (compiled, model.aggregator)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert counter.frame_count == 1
