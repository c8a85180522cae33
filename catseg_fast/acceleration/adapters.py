"""Adapters of aggregators that take other arguments, or have another cost volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

UpstreamInputs = tuple[Tensor, Tensor, Sequence["Tensor | None"]]


class Adapter:
    """Base class of mappings from the calls of a class of aggregators to upstream's aggregator.

    Each method gets a call's own arguments. What the engine then answers is compared with the aggregator's
    own code, as without an adapter: a wrong adapter is refused.

    Attributes:
        prompts: prompts per class in the text features; None for as many as the embedding has channels.
    """

    prompts: int | None = None

    def inputs(self, aggregator: nn.Module, *args: Any, **kwargs: Any) -> UpstreamInputs:
        """Return image features `[B, C, H, W]`, text features `[B, T, P, C]` and the three guidance maps."""
        raise NotImplementedError

    def example(
        self,
        aggregator: nn.Module,
        img_feats: Tensor,
        text_feats: Tensor,
        appearance_guidance: Sequence[Tensor | None],
    ) -> tuple[Any, ...]:
        """Return the positional arguments of a call, made of random ones of upstream's."""
        raise NotImplementedError

    def cost_volume(self, aggregator: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        """Return the cost volume `[B, P, T, H, W]`; None for upstream's, which is never held as a whole."""
        return None

    def finish(self, aggregator: nn.Module, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the aggregator's answer, given the logits `[B, T, 4H, 4W]` of upstream's."""
        return logits
