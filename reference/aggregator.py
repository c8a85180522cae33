"""Cost aggregation: from image and text features to one logit map per class.

CAT-Seg paper, section 3; upstream `cat_seg/modeling/transformer/model.py` (v2 at 6d3a188; v1 at af4fa0b is
`pad_len=0`). Constructor, forward arguments and state dict are upstream's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from catseg_fast.errors import InputError
from catseg_fast.reference.class_attention import ClassTransformerLayer
from catseg_fast.reference.shapes import check_pooling, check_shapes, check_sizes
from catseg_fast.reference.upsample import Up
from catseg_fast.reference.window_attention import SwinTransformerBlockWrapper

DROPPED_LOGIT = -100.0


def select_classes(img_feats: Tensor, text_feats: Tensor, count: int) -> Tensor:
    """Select the `count` classes of each crop with the largest cosine over prompts and positions.

    As the selection is not continuous, cosines are computed in fp32 at least.

    Args:
        img_feats: `[B, C, H, W]`.
        text_feats: `[B, T, P, C]`.
        count: classes to keep, at most T.

    Returns:
        Class indices `[B, count]`, ascending.
    """
    precise = torch.promote_types(img_feats.dtype, torch.float32)
    with torch.autocast(img_feats.device.type, enabled=False):
        cost_volume = correlation(img_feats.to(precise), text_feats.to(precise))
    scores = cost_volume.amax(dim=(1, 3, 4))
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def correlation(img_feats: Tensor, text_feats: Tensor) -> Tensor:
    """Return the cosine cost volume `[B, P, T, H, W]` of `[B, C, H, W]` and `[B, T, P, C]`."""
    return torch.einsum("bchw,btpc->bpthw", F.normalize(img_feats, dim=1), F.normalize(text_feats, dim=-1))


class AggregatorLayer(nn.Module):
    """Spatial aggregation (two window-attention blocks), then class aggregation."""

    def __init__(
        self,
        hidden_dim: int = 64,
        text_guidance_dim: int = 512,
        appearance_guidance: int = 512,
        nheads: int = 4,
        input_resolution: tuple[int, int] = (20, 20),
        pooling_size: tuple[int, int] | None = (5, 5),
        window_size: int = 10,
        attention_type: str = "linear",
        pad_len: int = 256,
    ) -> None:
        super().__init__()
        self.swin_block = SwinTransformerBlockWrapper(
            hidden_dim, appearance_guidance, input_resolution, nheads, window_size
        )
        self.attention = ClassTransformerLayer(
            hidden_dim, text_guidance_dim, nheads, attention_type, pooling_size, pad_len
        )

    def forward(self, x: Tensor, appearance_guidance: Tensor | None, text_guidance: Tensor | None) -> Tensor:
        """Map `x [B, C, T, H, W]` to the same shape, with guidance `[B, Cg, H, W]` and `[B, T, Ct]`."""
        return self.attention(self.swin_block(x, appearance_guidance), text_guidance)


class Aggregator(nn.Module):
    """The cost aggregation network.

    Args:
        text_guidance_dim: channels C of the features, and of the text guidance; 0 for no text guidance.
        text_guidance_proj_dim: channels of the projected text guidance.
        appearance_guidance_dim: channels of the first guidance map; 0 for no appearance guidance.
        appearance_guidance_proj_dim: channels of the projected appearance guidance.
        decoder_dims: output channels of the two decoder stages.
        decoder_guidance_dims: channels of the decoder's guidance maps; `(0,)` for none.
        decoder_guidance_proj_dims: channels of the projected decoder guidance.
        num_layers: aggregation layers.
        nheads: attention heads.
        hidden_dim: channels of the cost embedding.
        pooling_size: average pooling before class attention; None for none.
        feature_resolution: (H, W) that the stored window masks are made for.
        window_size: side of the attention windows.
        attention_type: "linear" or "full" class attention.
        prompt_channel: prompts P.
        pad_len: number of classes to which fewer are padded with a learned token (upstream v2); 0 (v1) for no
            padding.

    Attributes:
        max_classes: the most classes that are aggregated. If there are more, only the best-scoring ones of
            each crop are, and the others' logits are -100; None for no limit. By default `pad_len`, as in
            upstream.
    """

    def __init__(
        self,
        text_guidance_dim: int = 512,
        text_guidance_proj_dim: int = 128,
        appearance_guidance_dim: int = 512,
        appearance_guidance_proj_dim: int = 128,
        decoder_dims: Sequence[int] = (64, 32),
        decoder_guidance_dims: Sequence[int] = (256, 128),
        decoder_guidance_proj_dims: Sequence[int] = (32, 16),
        num_layers: int = 4,
        nheads: int = 4,
        hidden_dim: int = 128,
        pooling_size: tuple[int, int] | None = (6, 6),
        feature_resolution: tuple[int, int] = (24, 24),
        window_size: int = 12,
        attention_type: str = "linear",
        prompt_channel: int = 1,
        pad_len: int = 256,
    ) -> None:
        super().__init__()
        check_sizes(hidden_dim, nheads, decoder_dims, pooling_size, feature_resolution, window_size)
        self.num_layers = num_layers
        self.pooling_size = pooling_size
        self.hidden_dim = hidden_dim
        self.pad_len = pad_len
        self.max_classes = pad_len or None
        self.layers = nn.ModuleList(
            AggregatorLayer(
                hidden_dim, text_guidance_proj_dim, appearance_guidance_proj_dim, nheads,
                feature_resolution, pooling_size, window_size, attention_type, pad_len,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.conv1 = nn.Conv2d(prompt_channel, hidden_dim, kernel_size=7, padding=3)
        self.guidance_projection = (
            project_map(appearance_guidance_dim, appearance_guidance_proj_dim)
            if appearance_guidance_dim > 0
            else None
        )
        self.text_guidance_projection = (
            nn.Sequential(nn.Linear(text_guidance_dim, text_guidance_proj_dim), nn.ReLU())
            if text_guidance_dim > 0
            else None
        )
        self.decoder_guidance_projection = (
            nn.ModuleList(map(project_map, decoder_guidance_dims, decoder_guidance_proj_dims))
            if decoder_guidance_dims[0] > 0
            else None
        )
        self.decoder1 = Up(hidden_dim, decoder_dims[0], decoder_guidance_proj_dims[0])
        self.decoder2 = Up(decoder_dims[0], decoder_dims[1], decoder_guidance_proj_dims[1])
        self.head = nn.Conv2d(decoder_dims[1], 1, kernel_size=3, padding=1)

    @property
    def max_classes(self) -> int | None:
        return self._max_classes

    @max_classes.setter
    def max_classes(self, count: int | None) -> None:
        if count is not None and count <= 0:
            raise InputError(f"max_classes: {count} is not positive; None aggregates every class")
        self._max_classes = count

    def correlation(self, img_feats: Tensor, text_feats: Tensor) -> Tensor:
        """Return the cosine cost volume `[B, P, T, H, W]` of `[B, C, H, W]` and `[B, T, P, C]`."""
        return correlation(img_feats, text_feats)

    def corr_embed(self, cost_volume: Tensor) -> Tensor:
        """Embed the cost volume: `[B, P, T, H, W]` to `[B, hidden_dim, T, H, W]`."""
        embedding = self.conv1(rearrange(cost_volume, "B P T H W -> (B T) P H W"))
        return rearrange(embedding, "(B T) C H W -> B C T H W", B=len(cost_volume))

    def project_text(self, text_feats: Tensor) -> Tensor | None:
        """Return the text guidance `[B, T, text_guidance_proj_dim]` of `text_feats [B, T, P, C]`."""
        if self.text_guidance_projection is None:
            return None
        mean = text_feats.mean(dim=-2)
        return self.text_guidance_projection(mean / mean.norm(dim=-1, keepdim=True))

    def conv_decoder(self, x: Tensor, guidance: Sequence[Tensor | None]) -> Tensor:
        """Decode `x [B, hidden_dim, T, H, W]` to logits `[B, T, 4H, 4W]`."""
        decoded = self.decoder1(rearrange(x, "B C T H W -> (B T) C H W"), guidance[0])
        logits = self.head(self.decoder2(decoded, guidance[1]))
        return rearrange(logits, "(B T) 1 H W -> B T H W", B=len(x))

    def forward(
        self, img_feats: Tensor, text_feats: Tensor, appearance_guidance: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the logits `[B, T, 4H, 4W]` of every class.

        Args:
            img_feats: dense CLIP image features `[B, C, H, W]`.
            text_feats: CLIP text features `[B, T, P, C]`.
            appearance_guidance: maps `[B, C0, H, W]`, `[B, C1, 2H, 2W]`, `[B, C2, 4H, 4W]`.

        Raises:
            InputError: if there is no class, or the shapes do not match each other or the weights.
        """
        check_shapes(self, img_feats, text_feats, appearance_guidance)
        check_pooling(self.pooling_size, img_feats.shape[-2:])
        total, selected = text_feats.shape[1], None
        if self.max_classes is not None and total > self.max_classes:
            selected = select_classes(img_feats, text_feats, self.max_classes)
            # Upstream passes the normalised features on, so the mean over prompts is one of unit vectors.
            text_feats = F.normalize(text_feats, dim=-1)
            text_feats = text_feats.gather(1, selected[..., None, None].expand(-1, -1, *text_feats.shape[2:]))

        x = self.corr_embed(self.correlation(img_feats, text_feats))
        guidance = self.guidance_projection and self.guidance_projection(appearance_guidance[0])
        text_guidance = self.project_text(text_feats)
        decoder_guidance: Sequence[Tensor | None] = (None, None)
        if self.decoder_guidance_projection is not None:
            projections = zip(self.decoder_guidance_projection, appearance_guidance[1:], strict=True)
            decoder_guidance = [project(guidance_map) for project, guidance_map in projections]
        for layer in self.layers:
            x = layer(x, guidance, text_guidance)
        logits = self.conv_decoder(x, decoder_guidance)
        return logits if selected is None else restore_dropped(logits, selected, total)


def project_map(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return the 3x3 convolution and ReLU of a guidance map."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1), nn.ReLU())


def restore_dropped(logits: Tensor, selected: Tensor, total: int) -> Tensor:
    """Spread `logits [B, K, H, W]` of `selected [B, K]` over `total` classes; the others get -100."""
    B, _, H, W = logits.shape
    out = logits.new_full((B, total, H, W), DROPPED_LOGIT)
    return out.scatter(1, selected[..., None, None].expand(-1, -1, H, W), logits)
