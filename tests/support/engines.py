"""Small engines on the Triton back end, in float32; without a GPU, kernels run in the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from catseg_fast.engine.engine import Engine
from catseg_fast.engine.folding import Plan, build_plan
from catseg_fast.engine.terms import ImageTerms, image_terms
from catseg_fast.reference import Aggregator as Reference
from support.aggregators import features, make_aggregator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_inputs_of(
    aggregator: Reference, classes: int, crops: int = 1
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return random image features, text features and guidance maps."""
    image, text, guidance = features(aggregator, classes, crops)
    return image.float().to(DEVICE), text.float().to(DEVICE), [x.float().to(DEVICE) for x in guidance]


def make_engine(**changes: Any) -> Engine:
    """Return an engine on the Triton back end.

    It pools, because the class attention takes long per position in the interpreter.
    """
    arguments = {"prompt_channel": 1, "pooling_size": (2, 3), **changes}
    engine = Engine(make_aggregator(**arguments).float().to(DEVICE))
    engine.backend, engine.precision = "triton", torch.float32
    return engine


@torch.no_grad()
def make_terms(crops: int = 2, **changes: Any) -> tuple[Plan, ImageTerms]:
    """Return folded weights and the terms of random crops of 4 by 8 positions."""
    aggregator = make_aggregator(**changes).float()
    image, _, guidance = features(aggregator, 3, crops, (4, 8))
    plan = build_plan(aggregator, torch.float32)
    return plan, image_terms(aggregator, plan, image.float(), [x.float() for x in guidance])
