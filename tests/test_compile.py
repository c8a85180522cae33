"""One compiled graph of the aggregator for vocabularies of many sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from golden_rule import det, make_input
from tiny import V1, V2, tiny_model


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_one_graph_serves_all_vocabularies(version: Any) -> None:
    """Below, at and above the 8 classes that v2 pads to; from 16 on one thread takes other convolutions."""
    torch.compiler.reset()
    model = tiny_model(version, variant=replace(V1 if version == "v1" else V2, num_layers=1))
    aggregator, variant = model.aggregator, model.variant
    model.max_classes = None
    image = det("compile:image", (1, 32, 24, 24))
    sizes = (
        (variant.appearance_guidance_dim, 24),
        *zip(variant.decoder_guidance_dims, (48, 96), strict=True),
    )
    guidance = [det(f"compile:{side}", (1, channels, side, side)) for channels, side in sizes]
    counter = CompileCounterWithBackend("aot_eager" if version == "v2" else "eager")
    compiled = torch.compile(aggregator, fullgraph=True, backend=counter)
    for classes in (5, 3, 8, 15, 9):
        text = make_input("compile:text", "text", (1, classes, len(model.templates), 32))
        torch._dynamo.mark_dynamic(text, 1)
        answer = compiled(image, text, guidance)
        torch.testing.assert_close(answer, aggregator(image, text, guidance), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
