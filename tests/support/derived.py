"""Five aggregators in the manner of projects that derive from upstream's, and adapters for two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catseg_fast.acceleration import Adapter
from support.upstream_layers import AggregatorLayer
from support.upstream_like import ARGUMENTS, Aggregator


class ParallelBlocks(Aggregator):
    """Window blocks and class layer in parallel, mixed by experts."""

    class Layer(AggregatorLayer):
        def __init__(self, a: dict[str, Any]) -> None:
            super().__init__(a)
            self.router = nn.Linear(a["hidden_dim"], 2)

        def forward(self, x: Tensor, guidance: Tensor | None, text: Tensor | None) -> Tensor:
            share = self.router(x.mean(dim=(2, 3, 4))).softmax(dim=-1)[..., None, None, None, None]
            return share[:, 0] * self.swin_block(x, guidance) + share[:, 1] * self.attention(x, text)

    def __init__(self, **a: Any) -> None:
        super().__init__(**a)
        self.layers = nn.ModuleList(self.Layer({**ARGUMENTS, **a}) for _ in self.layers)


class WithTemperature(Aggregator):
    """A fourth argument by which the logits are divided."""

    def forward(  # type: ignore[override]
        self, img_feats: Tensor, text_feats: Tensor, appearance_guidance: Any, temperature: float
    ) -> Tensor:
        return super().forward(img_feats, text_feats, appearance_guidance) / temperature


class RotatedMaps(Aggregator):
    """The cost volumes of several rotated feature maps, one after the other."""

    def forward(self, img_feats: Any, text_feats: Tensor, appearance_guidance: Any) -> Tensor:
        return self.aggregate(self.costs(img_feats, text_feats), text_feats, appearance_guidance)

    def costs(self, img_feats: Sequence[Tensor], text_feats: Tensor) -> Tensor:
        return torch.cat([self.correlation(x, text_feats) for x in img_feats], dim=1)


class TwoStacks(Aggregator):
    """A second stack of layers, which gets the first one's result and half the guidance."""

    def __init__(self, **a: Any) -> None:
        super().__init__(**a)
        self.more_layers = nn.ModuleList(AggregatorLayer({**ARGUMENTS, **a}) for _ in self.layers)

    def run_layers(self, x: Tensor, guidance: Tensor | None, text: Tensor | None) -> Tensor:
        x = super().run_layers(x, guidance, text)
        for layer in self.more_layers:
            x = layer(x, None if guidance is None else 0.5 * guidance, text)
        return x


class OtherCostVolume(Aggregator):
    """Distances instead of cosines, and attention over the prompts."""

    def __init__(self, **a: Any) -> None:
        super().__init__(**a)
        self.prompts = nn.Parameter(torch.linspace(-1, 1, self.conv1.in_channels))

    def correlation(self, img_feats: Tensor, text_feats: Tensor) -> Tensor:
        image, text = F.normalize(img_feats, dim=1), F.normalize(text_feats, dim=-1)
        square = (image[:, :, None, None] - text.permute(0, 3, 1, 2)[..., None, None]).square().sum(dim=1)
        return (-square * self.prompts.softmax(0)[:, None, None]).transpose(1, 2)


class TemperatureAdapter(Adapter):
    """Adapter of `WithTemperature`."""

    def inputs(
        self, aggregator: nn.Module, image: Tensor, text: Tensor, guidance: Any, temperature: float
    ) -> Any:
        return image, text, guidance

    def example(self, aggregator: nn.Module, image: Tensor, text: Tensor, guidance: Any) -> tuple[Any, ...]:
        return image, text, guidance, 0.7

    def finish(
        self, aggregator: nn.Module, logits: Tensor, image: Any, text: Any, guidance: Any, temperature: float
    ) -> Tensor:
        return logits / temperature


class RotatedAdapter(Adapter):
    """Adapter of `RotatedMaps`, with one prompt per class and two maps."""

    prompts = 1

    def inputs(self, aggregator: nn.Module, images: Any, text: Tensor, guidance: Any) -> Any:
        return images[0], text, guidance

    def example(self, aggregator: nn.Module, image: Tensor, text: Tensor, guidance: Any) -> tuple[Any, ...]:
        return [image, image.roll(1, dims=3)], text, guidance

    def cost_volume(self, aggregator: Any, images: Any, text: Tensor, guidance: Any) -> Tensor:
        cost: Tensor = aggregator.costs(images, text)
        return cost
