"""CLIP with dense image features, on open_clip's model definitions.

Dense features skip the attention of the last block and keep its value path (CAT-Seg paper, section 3.1, after
MaskCLIP); upstream `cat_seg/third_party/model_vpt.py`. State-dict keys are upstream's: v1 keeps CLIP's joint
`in_proj_weight`, v2 splits it, because it only fine-tunes queries and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from catseg_fast.config import CLIPConfig, Version
from catseg_fast.weights import module_tensors


class SplitAttention(nn.Module):
    """Multi-head self-attention with separate parameters for query, key and value weights."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(embed_dim, embed_dim))) for _ in range(3)
        )
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend `query [B, N, C]` to `key` and `value [B, M, C]`, as batch-first `nn.MultiheadAttention`."""
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = (
            rearrange(F.linear(x, weight, bias), "B N (h d) -> B h N d", h=self.num_heads)
            for x, weight, bias in zip((query, key, value), weights, self.in_proj_bias.chunk(3), strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(rearrange(attended, "B h N d -> B N (h d)")), None


class DenseCLIP(CLIP):
    """Both CLIP towers; `encode_dense` gives a feature for every patch.

    Args:
        config: sizes of the towers.
        version: upstream's generation, which decides the attention's parameters and the last residual.
    """

    def __init__(self, config: CLIPConfig, version: Version) -> None:
        super().__init__(
            config.embed_dim,
            CLIPVisionCfg(
                layers=config.vision_layers,
                width=config.vision_width,
                head_width=config.vision_width // config.vision_heads,
                mlp_ratio=config.vision_mlp_ratio,
                patch_size=config.patch_size,
                image_size=config.image_size,
            ),
            CLIPTextCfg(
                context_length=config.context_length,
                vocab_size=config.vocab_size,
                width=config.text_width,
                heads=config.text_heads,
                layers=config.text_layers,
            ),
            quick_gelu=config.quick_gelu,
        )
        self.register_buffer("attn_mask", None)  # open_clip's; `encode_text` makes its own
        self.config = config
        self.version = version
        if version == "v2":
            for tower, heads in ((self.visual, config.vision_heads), (self, config.text_heads)):
                for block in tower.transformer.resblocks:
                    block.attn = SplitAttention(tower.transformer.width, heads)

    def encode_dense(self, images: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the features of every patch, and the outputs of some blocks.

        Args:
            images: `[B, 3, H, W]`, normalised with CLIP's mean and deviation.
            layers: indices of blocks (not the last one) whose outputs are returned.

        Returns:
            Features `[B, 1 + h*w, embed_dim]`, the class token first, where h and w count patches; and for
            each of `layers` the patch tokens `[B, width, h, w]`.
        """
        x = self.visual.conv1(images)
        height, width = x.shape[-2:]
        x = rearrange(x, "B C h w -> B (h w) C")
        x = torch.cat([self.visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.visual.ln_pre(x + self.position_embedding(height, width).to(x.dtype))

        outputs = {}
        *blocks, last = self.visual.transformer.resblocks
        for index, block in enumerate(blocks):
            x = block(x)
            if index in layers:
                outputs[index] = rearrange(x[:, 1:], "B (h w) C -> B C h w", h=height)
        x = self._value_path(last, x)
        return self.visual.ln_post(x) @ self.visual.proj, [outputs[index] for index in layers]

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Return features `[N, embed_dim]` of token ids `text [N, L]`, L at most the context length.

        Attention is causal, so tokens after the end-of-text token may be cut off without effect.
        """
        length = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:length]
        causal = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        x = self.transformer(x, attn_mask=causal)
        end_of_text = text.argmax(dim=-1)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end_of_text]) @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    @property
    def text_modules(self) -> tuple[nn.Module, ...]:
        """The modules that only `encode_text` uses."""
        return self.token_embedding, self.transformer, self.ln_final

    def text_parameters(self) -> list[Tensor]:
        """Return the parameters on which `encode_text` depends."""
        inside = [parameter for module in self.text_modules for parameter in module_tensors(module)]
        return [*inside, self.positional_embedding, self.text_projection]

    def position_embedding(self, height: int, width: int) -> Tensor:
        """Return the positional embedding `[1 + height*width, C]`, resized (bicubic) for another grid."""
        embedding = self.visual.positional_embedding
        side = self.config.image_size // self.config.patch_size
        if (height, width) == (side, side):
            return embedding
        grid = rearrange(embedding[1:], "(h w) C -> 1 C h w", h=side)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([embedding[:1], rearrange(grid, "1 C h w -> (h w) C")])

    def _value_path(self, block: ResidualAttentionBlock, x: Tensor) -> Tensor:
        """Apply the last block without attention: each token only takes its own value."""
        attention, channels = block.attn, x.shape[-1]
        joint = self.version == "v1"
        weight = attention.in_proj_weight[-channels:] if joint else attention.v_proj_weight
        values = F.linear(block.ln_1(x), weight, attention.in_proj_bias[-channels:])
        # Upstream v2 adds the class token's residual to every token; v1 each token's own.
        x = attention.out_proj(values) + (x if joint else x[:, :1])
        return x + block.mlp(block.ln_2(x))
