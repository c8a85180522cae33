"""An aggregator with upstream's structure, arguments and attributes, for tests; v1 is `pad_len=0`.

It is written to be altered: each step is a method. Unlike the reference it has upstream's limits: one
resolution, and a selection of classes that runs in fp32 only.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.golden_rule import det, fill, make_input
from support.upstream_layers import AggregatorLayer, Up, project


def cosines(img_feats: Tensor, text_feats: Tensor) -> Tensor:
    image, text = F.normalize(img_feats, dim=1), F.normalize(text_feats, dim=-1)
    return torch.einsum("bchw,btpc->bpthw", image, text)


class Aggregator(nn.Module):
    def __init__(self, **a: Any) -> None:
        super().__init__()
        a = {**ARGUMENTS, **a}
        self.pad_len = a["pad_len"]
        self.layers = nn.ModuleList(AggregatorLayer(a) for _ in range(a["num_layers"]))
        self.conv1 = nn.Conv2d(a["prompt_channel"], a["hidden_dim"], 7, padding=3)
        appearance, text = a["appearance_guidance_dim"], a["text_guidance_dim"]
        self.guidance_projection = (
            project(appearance, a["appearance_guidance_proj_dim"]) if appearance else None
        )
        self.text_guidance_projection = (
            nn.Sequential(nn.Linear(text, a["text_guidance_proj_dim"]), nn.ReLU()) if text else None
        )
        widths, (first, second) = a["decoder_guidance_proj_dims"], a["decoder_dims"]
        self.decoder_guidance_projection = (
            nn.ModuleList(map(project, a["decoder_guidance_dims"], widths)) if any(widths) else None
        )
        self.decoder1, self.decoder2 = Up(a["hidden_dim"], first, widths[0]), Up(first, second, widths[1])
        self.head = nn.Conv2d(second, 1, 3, padding=1)

    def correlation(self, img_feats: Tensor, text_feats: Tensor) -> Tensor:
        return cosines(img_feats, text_feats)

    def score(self, corr: Tensor) -> Tensor:
        return corr.amax(dim=(1, 3, 4))

    def corr_embed(self, corr: Tensor) -> Tensor:
        embedding = self.conv1(corr.transpose(1, 2).flatten(0, 1))
        return embedding.unflatten(0, (len(corr), -1)).transpose(1, 2)

    def text_guidance(self, text_feats: Tensor) -> Tensor | None:
        if self.text_guidance_projection is None:
            return None
        mean = text_feats.mean(dim=-2)
        return self.text_guidance_projection(mean / mean.norm(dim=-1, keepdim=True))

    def guidance(self, maps: Any) -> Any:
        appearance = None if self.guidance_projection is None else self.guidance_projection(maps[0])
        if self.decoder_guidance_projection is None:
            return appearance, [None, None]
        return appearance, [p(g) for p, g in zip(self.decoder_guidance_projection, maps[1:], strict=True)]

    def run_layers(self, x: Tensor, guidance: Tensor | None, text: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, guidance, text)
        return x

    def conv_decoder(self, x: Tensor, guidance: Any) -> Tensor:
        maps = self.decoder2(self.decoder1(x.transpose(1, 2).flatten(0, 1), guidance[0]), guidance[1])
        return self.head(maps).unflatten(0, (len(x), -1)).squeeze(2)

    def fill_dropped(self, logits: Tensor, kept: Tensor, total: int) -> Tensor:
        out = torch.full((len(logits), total, *logits.shape[2:]), -100.0, device=logits.device)
        return out.scatter_(1, kept[..., None, None].expand_as(logits), logits)

    def aggregate(self, corr: Tensor, text_feats: Tensor, maps: Any) -> Tensor:
        appearance, decoder = self.guidance(maps)
        x = self.run_layers(self.corr_embed(corr), appearance, self.text_guidance(text_feats))
        return self.conv_decoder(x, decoder)

    def forward(self, img_feats: Tensor, text_feats: Tensor, appearance_guidance: Any) -> Tensor:
        corr, total, kept = self.correlation(img_feats, text_feats), text_feats.shape[1], None
        if 0 < self.pad_len < total:
            kept = self.score(corr).topk(self.pad_len, dim=-1, sorted=False).indices
            text_feats = F.normalize(text_feats, dim=-1)
            text_feats = text_feats.gather(1, kept[..., None, None].expand(-1, -1, *text_feats.shape[2:]))
            corr = self.correlation(img_feats, text_feats)
        logits = self.aggregate(corr, text_feats, appearance_guidance)
        return logits if kept is None else self.fill_dropped(logits, kept, total)


ARGUMENTS: dict[str, Any] = {
    "text_guidance_dim": 24, "text_guidance_proj_dim": 16, "appearance_guidance_dim": 20,
    "appearance_guidance_proj_dim": 16, "decoder_dims": (32, 16), "decoder_guidance_dims": (12, 10),
    "decoder_guidance_proj_dims": (8, 4), "num_layers": 1, "nheads": 2, "hidden_dim": 32,
    "pooling_size": (1, 1), "feature_resolution": (8, 8), "window_size": 4, "prompt_channel": 2,
    "attention_type": "linear", "pad_len": 4,
}  # fmt: skip


def make_aggregator(kind: type[Aggregator] = Aggregator, **changes: Any) -> Aggregator:
    """An aggregator in evaluation mode, with weights by the golden rule."""
    return copy.deepcopy(_filled(kind, tuple(changes.items())))


@functools.cache
def _filled(kind: type[Aggregator], changes: tuple[tuple[str, Any], ...]) -> Aggregator:
    aggregator = kind(**dict(changes)).eval()
    fill(aggregator, "sem_seg_head.predictor.transformer.")
    return aggregator


@functools.cache
def make_inputs(
    classes: int = 3,
    crops: int = 1,
    resolution: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Arguments of an aggregator of `ARGUMENTS`; they are not to be changed in place."""
    key, (H, W) = f"derived:{classes}:{crops}:{resolution}", resolution
    image = det(f"{key}:image", (crops, 24, H, W))
    text = make_input(f"{key}:text", "text", (crops, classes, 2, 24))
    guidance = [
        det(f"{key}:{k}", (crops, channels, k * H, k * W)).to(dtype)
        for channels, k in ((20, 1), (12, 2), (10, 4))
    ]
    return image.to(dtype), text.to(dtype), guidance


def assert_equal(answer: Tensor, expected: Tensor, where: object) -> None:
    """Check that answers agree but for rounding in fp32."""
    assert answer.shape == expected.shape
    assert answer.dtype == expected.dtype
    kept = expected > -100
    assert torch.equal(answer > -100, kept), f"{where}: other classes are dropped"
    error = (answer - expected)[kept].abs().max() / expected[kept].std().clamp_min(1e-3)
    assert error < 3e-5, f"{where}: error {error:.2g}"


@torch.no_grad()
def assert_same(model: Any, own: nn.Module, *numbers: int) -> None:
    """Check two calls of each number of classes."""
    for classes in numbers or (3, 7):
        batch = make_inputs(classes, 2)
        expected = own(*batch)
        for call in range(2):
            assert_equal(model(*batch), expected, (classes, call))
