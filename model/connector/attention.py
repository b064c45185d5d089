"""What the connectors with learned queries share: queries that gather from tokens, and the network behind it.

Queries, keys and values have a matrix each, so that Muon treats each of them as one; the queries are an nn.Embedding, which
no optimizer takes for a matrix (model/optimizer.py).
Legend: N images, Q queries, S tokens they read, C channels, H heads, K channels per head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.registry import UserError


def query_table(queries: int, channels: int) -> nn.Embedding:
    """`queries` learned vectors; UserError when there is none."""
    if queries < 1:
        raise UserError(f"queries={queries}: at least one query is needed; each becomes one token")
    table = nn.Embedding(queries, channels)
    # Small, as BLIP-2's: they are normed before they ask, but what they read is added to them as they are. With unit variance a
    # resampler's tokens differ by 0.1 of their size between two pictures of the world, with this by 0.6 (a connector at birth).
    nn.init.normal_(table.weight, std=0.02)
    return table


def feed_forward(channels: int) -> nn.Sequential:
    """Norm, then two linear maps with a GELU between them, four times as wide inside."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over H heads; what is read may have other channels than the queries."""

    def __init__(self, channels: int, heads: int, source: int):
        super().__init__()
        if heads < 1 or channels % heads:
            raise UserError(f"heads={heads} does not divide the {channels} channels of the language model")
        self.heads = heads
        self.q_proj, self.o_proj = nn.Linear(channels, channels, bias=False), nn.Linear(channels, channels, bias=False)
        self.k_proj, self.v_proj = nn.Linear(source, channels, bias=False), nn.Linear(source, channels, bias=False)
        # Normed inputs then give logits of variance 1. PyTorch's third of it is so flat that all queries read the same mean.
        for proj in (self.q_proj, self.k_proj):
            nn.init.normal_(proj.weight, std=proj.in_features**-0.5)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """(N, Q, C), (N, S, source channels) -> (N, Q, C)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, H, Q or S, K)
                   for part in (self.q_proj(x), self.k_proj(source), self.v_proj(source)))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
