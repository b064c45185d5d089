"""A small transformer of learned queries: they speak with each other, and every other block looks at the picture.

In:  features (N, P, D).    Out: (N, queries, C).
Source: BLIP-2's Q-Former (arXiv 2301.12597, section 3.1 and figure 2), without its text side and, where BERT norms after each
addition, normed before, as the other parts here are. BLIP-2 has 32 queries, 12 blocks, and begins from BERT's weights.
"""

from torch import Tensor, nn

from model.connector import Connector
from model.connector.attention import Attention, feed_forward, query_table
from model.encoder import Encoder
from model.registry import CONNECTORS, UserError


class Block(nn.Module):
    """Self-attention among the queries, cross-attention to the picture in some blocks, the network; each is added."""

    def __init__(self, channels: int, heads: int, picture: int, looks: bool):
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(channels), Attention(channels, heads, source=channels)
        self.cross_norm = nn.LayerNorm(channels) if looks else None
        self.cross_attention = Attention(channels, heads, source=picture) if looks else None
        self.network = feed_forward(channels)

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        """(N, Q, C), normed (N, P, D) -> (N, Q, C)."""
        queries = self.self_norm(x)
        x = x + self.self_attention(queries, queries)
        if self.cross_norm is not None and self.cross_attention is not None:
            x = x + self.cross_attention(self.cross_norm(x), picture)
        return x + self.network(x)


@CONNECTORS.register("qformer")
class QFormer(Connector):
    """Learned queries in a transformer that looks at the picture in every `every`-th block, from the first on (BLIP-2)."""

    def __init__(self, encoder: Encoder, channels: int, queries: int = 16, depth: int = 4, heads: int = 8, every: int = 2):
        super().__init__()
        if depth < 1 or every < 1:
            raise UserError(f"qformer:depth={depth},every={every}: both are 1 at least, or no block looks at the picture")
        self.tokens, self.queries = queries, query_table(queries, channels)
        self.picture_norm = nn.LayerNorm(encoder.dim)
        self.blocks = nn.ModuleList(Block(channels, heads, encoder.dim, layer % every == 0) for layer in range(depth))
        self.norm, self.proj = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D) -> (N, queries, C), whichever image of its conversation it is."""
        picture = self.picture_norm(features)
        x = self.queries.weight.expand(len(features), -1, -1)  # (N, queries, C)
        for block in self.blocks:
            x = block(x, picture)
        return self.proj(self.norm(x))
