"""A small transformer of learned queries: they attend to each other, and in every other block to the image.

In:  features (N, P, D).    Out: (N, queries, C).
Legend: N images, P tokens per image, D channels of the encoder, C channels of the LLM.
Source: BLIP-2's Q-Former (arXiv 2301.12597, section 3.1 and figure 2), without its text side, and with norms before each part
(BERT norms after it). BLIP-2 has 32 queries and 12 blocks, and begins from BERT's weights.
"""

from torch import Tensor, nn

from model.connector import Connector
from model.connector.attention import Attention, feed_forward, query_table
from model.encoder import Encoder
from model.registry import CONNECTORS, UserError


class Block(nn.Module):
    """Self-attention between the queries, in some blocks cross-attention to the image, then the network; each output is added."""

    def __init__(self, channels: int, heads: int, image_channels: int, has_cross_attention: bool):
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(channels), Attention(channels, heads, source=channels)
        self.cross_norm = nn.LayerNorm(channels) if has_cross_attention else None
        self.cross_attention = Attention(channels, heads, source=image_channels) if has_cross_attention else None
        self.network = feed_forward(channels)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """(N, queries, C), normed (N, P, D) -> (N, queries, C)."""
        queries = self.self_norm(x)
        x = x + self.self_attention(queries, queries)
        if self.cross_norm is not None and self.cross_attention is not None:
            x = x + self.cross_attention(self.cross_norm(x), image)
        return x + self.network(x)


@CONNECTORS.register("qformer")
class QFormer(Connector):
    """Learned queries in a transformer that attends to the image in blocks 0, `every`, 2 x `every`, ... (BLIP-2)."""

    def __init__(self, encoder: Encoder, channels: int, queries: int = 16, depth: int = 4, heads: int = 8, every: int = 2):
        super().__init__()
        if depth < 1 or every < 1:
            raise UserError(f"qformer:depth={depth},every={every}: both must be at least 1, or no block attends to the image")
        self.tokens, self.queries = queries, query_table(queries, channels)
        self.picture_norm = nn.LayerNorm(encoder.dim)
        self.blocks = nn.ModuleList(Block(channels, heads, encoder.dim, layer % every == 0) for layer in range(depth))
        self.norm, self.proj = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D) -> (N, queries, C); image_index is not used."""
        image = self.picture_norm(features)
        x = self.queries.weight.expand(len(features), -1, -1)  # (N, queries, C)
        for block in self.blocks:
            x = block(x, image)
        return self.proj(self.norm(x))
