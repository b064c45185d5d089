"""Learned queries that read the image: it becomes as many tokens as there are queries, however many patches it has.

In:  features (N, P, D).    Out: (N, queries, C).
Legend: N images, P tokens per image, D channels of the encoder, C channels of the LLM.
Source: Flamingo's Perceiver resampler (arXiv 2204.14198, section 2.1 and figure 5), after the Perceiver (arXiv 2103.03206).
"""

import torch
from torch import Tensor, nn

from model.connector import Connector
from model.connector.attention import Attention, feed_forward, query_table
from model.encoder import Encoder
from model.registry import CONNECTORS, UserError


class Block(nn.Module):
    """The queries attend to the image and to each other, then the network; each output is added."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention, self.network = Attention(channels, heads, source=channels), feed_forward(channels)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """(N, queries, C), normed (N, P, C) -> (N, queries, C)."""
        queries = self.norm(x)
        x = x + self.attention(queries, torch.cat([image, queries], dim=1))  # keys: (N, P + queries, C)
        return x + self.network(x)


@CONNECTORS.register("resampler")
class Resampler(Connector):
    """Learned queries read the image in `depth` blocks of cross-attention (Flamingo)."""

    def __init__(self, encoder: Encoder, channels: int, queries: int = 16, depth: int = 2, heads: int = 8):
        super().__init__()
        if depth < 1:
            raise UserError(f"resampler:depth={depth}: without a block nothing reads the image")
        self.tokens, self.queries = queries, query_table(queries, channels)
        self.proj = nn.Sequential(nn.Linear(encoder.dim, channels, bias=False), nn.LayerNorm(channels))
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D) -> (N, queries, C); image_index is not used."""
        image = self.proj(features)  # (N, P, C)
        x = self.queries.weight.expand(len(features), -1, -1)  # (N, queries, C)
        for block in self.blocks:
            x = block(x, image)
        return self.norm(x)
