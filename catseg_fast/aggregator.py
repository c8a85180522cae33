"""The aggregator with exchangeable back ends; arguments and state dict are the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from catseg_fast import reference
from catseg_fast.backend import check_backend
from catseg_fast.engine.engine import Engine, constant_backend
from catseg_fast.reference.shapes import check_shapes


class Aggregator(reference.Aggregator):
    """`catseg_fast.reference.Aggregator`, run by the back end of the user's choice.

    Args:
        *args: those of `catseg_fast.reference.Aggregator`.
        **kwargs: the same.
        backend: "auto", "triton", "torch" or "reference"; may be set later, too.

    Attributes:
        engine: runs the model but for the reference back end; it has the settings for memory and precision.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine = Engine(self)
        self.backend = backend

    @property
    def backend(self) -> str:
        return self.engine.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.engine.backend = check_backend(backend)

    def forward(
        self, img_feats: Tensor, text_feats: Tensor, appearance_guidance: Sequence[Tensor | None]
    ) -> Tensor:
        if constant_backend(self.backend, img_feats.device) == "reference":
            return super().forward(img_feats, text_feats, appearance_guidance)
        check_shapes(self, img_feats, text_feats, appearance_guidance)
        return self.engine.logits(img_feats, text_feats, appearance_guidance, self.max_classes)
